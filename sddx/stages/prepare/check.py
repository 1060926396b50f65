"""What preparing rows refuses before any work."""

from __future__ import annotations

from sddx.config.build import Settings
from sddx.errors import UserError
from sddx.stages.local_model import Check


def of_settings(method: Settings) -> list[Check]:
    """There are rows, and the tasks whose skill they are said to train exist."""
    from sddx.data.check import require_rows

    if not method["loss"]["terms"]:
        return []
    return [lambda: require_rows(method["dataset"], method["validation"]), lambda: check_trained(method)]


def check_trained(method: Settings) -> None:
    """The tasks whose skill the rows are said to train exist: else none would be marked. Raises UserError."""
    from sddx.evaluation.tasks import missing, not_texts

    trains = method["dataset"].get("trains") or []
    wrong = not_texts(trains, "dataset.trains") + missing(trains, method["evaluation"]["include"], "dataset.trains")
    if wrong:
        raise UserError(*wrong)
