"""What came back: a run's recoveries, from per-item scores of its models (science.md, "What is reported")."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from sddx.evaluation.likelihood import MEASURES
from sddx.evaluation.statistics import (
    Clusters,
    Scores,
    binary,
    flips,
    macro_average,
    ratio_interval,
    standard_error,
    task_weights,
)


def summarise(
    models: Mapping[str, Scores],
    *,
    chance: Mapping[str, float | None],
    trained: Collection[str] = (),
    part_of: Mapping[str, str] | None = None,
    apart: Collection[str] = (),
    clusters: Clusters | None = None,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores and recoveries under the names that `summary.json` and W&B use, as fractions (not percent).

    `models` holds the per-item scores of "unpruned" and, where they exist, "pruned" and "recovered", by task
    and on the same items. `trained` names reported tasks whose skill was trained on; `part_of` maps a task to
    the reported task that it is a part of. `chance` is a level by task. Reported tasks that stand `apart` have
    scores and errors and are in no average and no recovery. `clusters` say which items are one draw.

    recovery = macro average of recovered / macro average of unpruned; `recovery_low` and `recovery_high`
    bound it over items. gap_closed = (recovered - pruned) / (unpruned - pruned). recovery_above_chance
    subtracts the chance level from every score first. None stands where a number is not defined: no such
    model, no such task, a denominator of 0, a task without a chance level, or the error of a single item.
    """
    every = {task: (part_of or {}).get(task, task) for task in models["unpruned"]}
    names = {task: name for task, name in every.items() if name not in apart}
    errors = {model: _standard_errors(scores, every, apart, clusters or {}) for model, scores in models.items()}
    held_out = set(names.values()) - set(trained)
    return {
        "scores": {model: _reported(scores, every, apart) for model, scores in models.items()},
        "standard_errors": errors,
        **_interval(models, names, clusters, level, replicates, seed),
        "recovery_contains": "items",
        "pruned_recovery": _ratio(models, "pruned", names),
        "recovery_trained": _ratio(models, "recovered", names, only=trained),
        "recovery_held_out": _ratio(models, "recovered", names, only=held_out),
        "recovery_above_chance": _above_chance(models, names, chance),
        "gap_closed": _gap_closed(models, names),
        "trained": sorted(set(trained) & set(every.values())),
        "apart": sorted(set(apart) & set(every.values())),
        "flipped": {
            model: _flipped(models["unpruned"], scores) for model, scores in models.items() if model != "unpruned"
        },
    }


def _interval(
    models: Mapping[str, Scores],
    names: Mapping[str, str],
    clusters: Clusters | None,
    level: float,
    replicates: int,
    seed: int,
) -> dict[str, float | None]:
    if _ratio(models, "recovered", names) is None:
        return {"recovery": None, "recovery_low": None, "recovery_high": None}
    recovered, unpruned = ({task: models[each][task] for task in names} for each in ("recovered", "unpruned"))
    found = ratio_interval(
        recovered,
        unpruned,
        weights=task_weights(list(names), names),
        clusters=clusters,
        level=level,
        replicates=replicates,
        seed=seed,
    )
    bounds = {"recovery": found.estimate, "recovery_low": found.low, "recovery_high": found.high}
    return {name: value if math.isfinite(value) else None for name, value in bounds.items()}


def _ratio(
    models: Mapping[str, Scores], model: str, names: Mapping[str, str], only: Collection[str] | None = None
) -> float | None:
    tasks = [task for task, name in names.items() if only is None or name in only]
    if model not in models or not tasks:
        return None
    weights = task_weights(tasks, names)
    chosen = {which: {task: models[which][task] for task in tasks} for which in (model, "unpruned")}
    return _divide(macro_average(chosen[model], weights), macro_average(chosen["unpruned"], weights))


def _above_chance(
    models: Mapping[str, Scores], names: Mapping[str, str], chance: Mapping[str, float | None]
) -> float | None:
    if "recovered" not in models:
        return None
    levels = {task: chance.get(task) for task in names}
    known = {task: value for task, value in levels.items() if value is not None}
    if len(known) < len(levels):
        return None
    weights = task_weights(list(names), names)
    average_chance = sum(weights[task] * value for task, value in known.items())
    recovered, unpruned = (_average(models[model], weights) for model in ("recovered", "unpruned"))
    return _divide(recovered - average_chance, unpruned - average_chance)


def _gap_closed(models: Mapping[str, Scores], names: Mapping[str, str]) -> float | None:
    if not {"pruned", "recovered"} <= models.keys():
        return None
    weights = task_weights(list(names), names)
    average = {model: _average(scores, weights) for model, scores in models.items()}
    return _divide(average["recovered"] - average["pruned"], average["unpruned"] - average["pruned"])


def _average(scores: Scores, weights: Mapping[str, float]) -> float:
    """The macro average over the tasks that have a weight."""
    return macro_average({task: scores[task] for task in weights}, weights)


def _divide(numerator: float, denominator: float) -> float | None:
    # A difference of equal averages can leave rounding dust, which must not pass for a denominator.
    return numerator / denominator if abs(denominator) > 1e-12 else None


def _reported(scores: Scores, names: Mapping[str, str], apart: Collection[str]) -> dict[str, float]:
    parts = _parts(names)
    means = {name: macro_average({task: scores[task] for task in tasks}) for name, tasks in parts.items()}
    return means | {"average": float(np.mean([mean for name, mean in means.items() if name not in apart]))}


def _standard_errors(
    scores: Scores, names: Mapping[str, str], apart: Collection[str], clusters: Clusters
) -> dict[str, float | None]:
    """Tasks are independent samples of items: squared errors of an unweighted mean of k add up over k^2. None for a
    reported task of one item, and then for the average."""
    errors = {
        name: _error([scores[task] for task in tasks], [clusters.get(task) for task in tasks])
        for name, tasks in _parts(names).items()
    }
    counted = [error for name, error in errors.items() if name not in apart]
    known = [error for error in counted if error is not None]
    return errors | {"average": math.hypot(*known) / len(counted) if len(known) == len(counted) else None}


def _error(parts: Sequence[Sequence[float]], clusters: Sequence[Sequence[Hashable] | None]) -> float | None:
    """Standard error of the unweighted mean of parts. A part of one item does not show how its items vary: it takes
    the spread of all items, which has that between parts in it and so is too large if anything."""
    items = np.concatenate(parts)
    if len(items) < 2:
        return None
    spread = float(np.std(items, ddof=1))
    found = [standard_error(part, shared) for part, shared in zip(parts, clusters, strict=True)]
    errors = [spread if error is None else error for error in found]
    return math.hypot(*errors) / len(parts)


def likelihoods(
    records: Mapping[str, Mapping[str, Any]], part_of: Mapping[str, str], apart: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """By measure (sddx.evaluation.likelihood) what one model's tasks have of it, from their records: the unweighted
    mean over the parts of each reported task, and under "average" over those that do not stand `apart`. A task that
    has no such measure is in neither."""
    found: dict[str, dict[str, float]] = {}
    for measure in MEASURES:
        parts: dict[str, list[Any]] = {
            name: [records[task].get(measure) for task in tasks] for name, tasks in _parts(part_of).items()
        }
        means = {name: float(np.mean(values)) for name, values in parts.items() if None not in values}
        counted = [mean for name, mean in means.items() if name not in apart]
        found[measure] = means | ({"average": float(np.mean(counted))} if counted else {})
    return found


def reported_chance(
    chance: Mapping[str, float | None], part_of: Mapping[str, str] | None = None
) -> dict[str, float | None]:
    """Chance levels of reported tasks: the mean over their parts, None where one is not known."""
    parts = _parts({task: (part_of or {}).get(task, task) for task in chance})
    known = {
        name: [level for task in tasks if (level := chance[task]) is not None] for name, tasks in parts.items()
    }
    return {name: float(np.mean(known[name])) if len(known[name]) == len(parts[name]) else None for name in parts}


def _parts(names: Mapping[str, str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for task, name in names.items():
        parts.setdefault(name, []).append(task)
    return parts


def _flipped(unpruned: Scores, model: Scores) -> dict[str, dict[str, int] | None]:
    """Items right under the unpruned model and wrong under this one, and the reverse; None if not binary."""
    flipped: dict[str, dict[str, int] | None] = {}
    for task, before in unpruned.items():
        if not (binary(before) and binary(model[task])):
            flipped[task] = None
            continue
        lost, won = flips(before, model[task])
        flipped[task] = {"right_to_wrong": lost, "wrong_to_right": won}
    return flipped
