"""What scoring refuses before any work."""

from __future__ import annotations

from functools import partial

from sddx.config.build import Settings, build
from sddx.stages.local_model import Check


def of_settings(method: Settings) -> list[Check]:
    """The tasks that the metric looks at are there, what the metric gives can be used, and its texts can be had."""
    from sddx.data.check import require_texts
    from sddx.importance.score import require_metric

    metric = method["pruning"].get("metric")
    checks: list[Check] = [lambda: _check_looked_at(method["pruning"])]
    if metric is not None:
        checks.append(lambda: require_metric("pruning.metric", build(metric)))
    return [*checks, partial(require_texts, "calibration", method["calibration"])]


def _check_looked_at(pruning: Settings) -> None:
    """The tasks that a metric looks at can be evaluated, and what they read is there. Raises UserError."""
    require = getattr(getattr(build(pruning).metric, "value", None), "require", None)
    if require:
        require()
