"""What scoring refuses before any work."""

from __future__ import annotations

from functools import partial
from typing import Any

from sddx.config.build import Settings, build
from sddx.errors import UserError
from sddx.records import Units
from sddx.stages.held_out import require_other_items
from sddx.stages.local_model import Check, LocalModel
from sddx.stages.score.asked import scored_by


def of_settings(method: Settings) -> list[Check]:
    """What each metric gives can be used, the tasks that it looks at are there, and its texts can be had."""
    from sddx.data.check import require_texts

    evaluation = None if "metrics" in method else method["evaluation"]
    checks: list[Check] = [partial(_check, *each, evaluation) for each in _asked(method).items()]
    return [*checks, partial(require_texts, "calibration", method["calibration"])]


def of_model(method: Settings, model: LocalModel) -> list[Check]:
    """Each metric can measure so many units, and the tasks that it looks at are in words of the model."""
    units = method["pruning"].get("units", "blocks")
    return [partial(_check_measured, node, units, model.config) for node in _asked(method).values()]


def _asked(method: Settings) -> dict[str, Settings]:
    return scored_by(method, alone="metrics" in method)


def _check(where: str, node: Settings, evaluation: Settings | None) -> None:
    """It gives a score for each unit, tried on states of three, and the tasks that it looks at can be evaluated, on
    other items than the run's evaluation reports on. Raises UserError."""
    from sddx.importance.score import require_metric

    metric = build(node)
    require_metric(where, metric)
    value: Any = getattr(metric, "value", None)
    if require := getattr(value, "require", None):
        require(f"{where}.value")
    side, split = getattr(value, "side", None), getattr(value, "split", None)
    if evaluation is not None and (side == "selection" or split):
        asked = {"side": side, "include": value.include}
        require_other_items(f"{where}.value", value.tasks, split, evaluation, **asked)


def _check_measured(node: Settings, units: str, config: Any) -> None:
    """The metric can measure so many units, and the tasks that it looks at are in words of the model. Raises
    UserError."""
    from sddx.evaluation.tasks import OWN_TASKS, named_in_files
    from sddx.models.load import text_config

    metric = build(node)
    getattr(metric, "require", lambda units: None)(len(Units(units, config.num_hidden_layers)))
    tasks = getattr(getattr(metric, "value", None), "tasks", [])
    embedded = [task for task in tasks if task in named_in_files([OWN_TASKS])]
    if embedded and config.vocab_size != text_config(OWN_TASKS.parent / "checkpoint").vocab_size:
        raise UserError(
            f"The pruning metric looks at {', '.join(embedded)}, of the embedded world, and this model has other "
            "words. Give tasks of yours, as in pruning.metric.value.tasks=[mmlu] "
            "'pruning.metric.value.split={mmlu: validation}' (see conf/pruning/shapley_task.yaml)."
        )
