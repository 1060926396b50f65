"""What came back: a run's recoveries, from per-item scores of its models (docs/science.md, "What is
reported")."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from sddx.evaluation.right_answers import MEASURES
from sddx.records import ROLES
from sddx.statistics.intervals import (
    Clusters,
    Scores,
    binary,
    flips,
    macro_average,
    ratio_interval,
    standard_error,
    task_weights,
)

# What is said of every subject, and of the student at the top.
OF_STUDENT = (
    *("recovery", "recovery_low", "recovery_high", "recovery_trained", "recovery_held_out"),
    *("recovery_above_chance", "gap_closed"),
)


def summarise(
    models: Mapping[str, Scores],
    *,
    chance: Mapping[str, float | None],
    roles: Mapping[str, str] = ROLES,
    trained: Collection[str] = (),
    part_of: Mapping[str, str] | None = None,
    apart: Collection[str] = (),
    clusters: Clusters | None = None,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores and recoveries under the names that `summary.json` and W&B use, as fractions (not percent).

    `models` holds the per-item scores of every subject, by task and on the same items; `roles` says which of them
    is the `reference` (the unpruned model), which the `cut` and which a `student`. `trained` names reported tasks
    whose skill was trained on; `part_of` maps a task to the reported task that it is a part of. `chance` is a level
    by task. Reported tasks that stand `apart` have scores and errors and are in no average and no recovery.
    `clusters` say which items are one draw.

    Under `recoveries`, of every subject but the reference: recovery = its macro average / the reference's;
    `recovery_low` and `recovery_high` bound it over items. gap_closed = (its average - the cut's) / (the
    reference's - the cut's). recovery_above_chance subtracts the chance level from every score first. The student's
    stand at the top as well. None stands where a number is not defined: no such model, no such task, a denominator
    of 0, a task without a chance level, or the error of a single item.
    """
    role: dict[str, str] = {}  # the first of each
    for name, kind in roles.items():
        if name in models:
            role.setdefault(kind, name)
    reference, cut = role["reference"], role.get("cut")
    every = {task: (part_of or {}).get(task, task) for task in models[reference]}
    names = {task: name for task, name in every.items() if name not in apart}
    held_out = set(names.values()) - set(trained)
    interval = {"level": level, "replicates": replicates, "seed": seed}
    recoveries = {
        name: {
            **_interval(scores, models[reference], names, clusters, **interval),
            "recovery_trained": _ratio(scores, models[reference], names, only=trained),
            "recovery_held_out": _ratio(scores, models[reference], names, only=held_out),
            "recovery_above_chance": _above_chance(scores, models[reference], names, chance),
            "gap_closed": _gap_closed(scores, models[cut], models[reference], names) if cut else None,
        }
        for name, scores in models.items()
        if name != reference
    }
    return {
        "scores": {model: _reported(scores, every, apart) for model, scores in models.items()},
        "standard_errors": {
            m: _standard_errors(scores, every, apart, clusters or {}) for m, scores in models.items()
        },
        **recoveries.get(role.get("student", ""), dict.fromkeys(OF_STUDENT)),
        "recovery_contains": "items",
        "pruned_recovery": _ratio(models[cut], models[reference], names) if cut else None,
        "recoveries": recoveries,
        "trained": sorted(set(trained) & set(every.values())),
        "apart": sorted(set(apart) & set(every.values())),
        "flipped": {name: _flipped(models[reference], models[name]) for name in recoveries},
    }


def _interval(
    scores: Scores, reference: Scores, names: Mapping[str, str], clusters: Clusters | None, **settings: Any
) -> dict[str, float | None]:
    if _ratio(scores, reference, names) is None:
        return {"recovery": None, "recovery_low": None, "recovery_high": None}
    sides = ({task: each[task] for task in names} for each in (scores, reference))
    interval = ratio_interval(*sides, weights=task_weights(list(names), names), clusters=clusters, **settings)
    bounds = {"recovery": interval.estimate, "recovery_low": interval.low, "recovery_high": interval.high}
    return {name: value if math.isfinite(value) else None for name, value in bounds.items()}


def _ratio(
    scores: Scores, reference: Scores, names: Mapping[str, str], only: Collection[str] | None = None
) -> float | None:
    tasks = [task for task, name in names.items() if only is None or name in only]
    if not tasks:
        return None
    weights = task_weights(tasks, names)
    return _divide(_average(scores, weights), _average(reference, weights))


def _above_chance(
    scores: Scores, reference: Scores, names: Mapping[str, str], chance: Mapping[str, float | None]
) -> float | None:
    levels = {task: chance.get(task) for task in names}
    known = {task: value for task, value in levels.items() if value is not None}
    if len(known) < len(levels):
        return None
    weights = task_weights(list(names), names)
    average_chance = sum(weights[task] * value for task, value in known.items())
    return _divide(_average(scores, weights) - average_chance, _average(reference, weights) - average_chance)


def _gap_closed(scores: Scores, cut: Scores, reference: Scores, names: Mapping[str, str]) -> float | None:
    weights = task_weights(list(names), names)
    low = _average(cut, weights)
    return _divide(_average(scores, weights) - low, _average(reference, weights) - low)


def _average(scores: Scores, weights: Mapping[str, float]) -> float:
    """The macro average over the tasks that have a weight."""
    return macro_average({task: scores[task] for task in weights}, weights)


def average(records: Mapping[str, Mapping[str, Any]]) -> float:
    """The macro average of what a model scored, by the records of its tasks (`evaluate`)."""
    judged = {task: record for task, record in records.items() if not record["apart"]}
    scores = {task: [sample["score"] for sample in record["samples"]] for task, record in judged.items()}
    return _average(scores, task_weights(list(judged), {task: each["part_of"] for task, each in judged.items()}))


def _divide(numerator: float, denominator: float) -> float | None:
    # Rounding dust must not pass for a denominator. Below zero there was nothing to lose: where a cut scores more
    # than the unpruned model, worse would look better.
    return numerator / denominator if denominator > 1e-12 else None


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
    estimates = [standard_error(part, shared) for part, shared in zip(parts, clusters, strict=True)]
    errors = [spread if error is None else error for error in estimates]
    return math.hypot(*errors) / len(parts)


def likelihoods(
    records: Mapping[str, Mapping[str, Any]], part_of: Mapping[str, str], apart: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """By measure (`right_answers`) what one model's tasks have of it, from their records: the unweighted
    mean over the parts of each reported task, and under "average" over those that do not stand `apart`. A task that
    has no such measure is in neither."""
    by_measure: dict[str, dict[str, float]] = {}
    for measure in MEASURES:
        parts: dict[str, list[Any]] = {
            name: [records[task].get(measure) for task in tasks] for name, tasks in _parts(part_of).items()
        }
        means = {name: float(np.mean(values)) for name, values in parts.items() if None not in values}
        counted = [mean for name, mean in means.items() if name not in apart]
        by_measure[measure] = means | ({"average": float(np.mean(counted))} if counted else {})
    return by_measure


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
