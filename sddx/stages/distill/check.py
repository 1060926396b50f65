"""What rewriting refuses before any work."""

from __future__ import annotations

from sddx.config.build import Settings, build
from sddx.stages.local_model import Check


def of_settings(method: Settings) -> list[Check]:
    """There is a template to rewrite by, and what writes the answers is installed."""
    from sddx.data.templates import rewriting_prompt

    checks: list[Check] = []
    if method["loss"]["data"] == "self":
        checks.append(lambda: rewriting_prompt(method["dataset"]["rewrite"], "", ""))
    if method["loss"]["data"] != "reference":
        checks.append(lambda: getattr(build(method["generation"]), "require", lambda: None)())
    return checks
