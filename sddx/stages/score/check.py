"""What scoring refuses before any work."""

from __future__ import annotations

from functools import partial
from typing import Any

from sddx.config.build import Settings, build
from sddx.stages.held_out import require_other_items
from sddx.stages.local_model import Check
from sddx.stages.score.asked import scored_by


def of_settings(method: Settings) -> list[Check]:
    """What each metric gives can be used, the tasks that it looks at are there, and its texts can be had."""
    from sddx.data.check import require_texts

    alone = "metrics" in method
    evaluation = None if alone else method["evaluation"]
    checks: list[Check] = [partial(_check, *each, evaluation) for each in scored_by(method, alone=alone).items()]
    return [*checks, partial(require_texts, "calibration", method["calibration"])]


def _check(where: str, node: Settings, evaluation: Settings | None) -> None:
    """It gives a score for each unit, tried on states of three, and the tasks that it looks at can be evaluated, on
    other items than the run's evaluation reports on. Raises UserError."""
    from sddx.importance.score import require_metric

    metric = build(node)
    require_metric(where, metric)
    value: Any = getattr(metric, "value", None)
    if require := getattr(value, "require", None):
        require(f"{where}.value")
    if evaluation is not None and getattr(value, "side", None) == "selection":
        require_other_items(f"{where}.value", value.tasks, value.split, evaluation)
