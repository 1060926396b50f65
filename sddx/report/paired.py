"""Paired differences of runs, item by item."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from sddx.config import flatten
from sddx.errors import UserError
from sddx.evaluation.right_answers import MEASURES
from sddx.report.subjects import having
from sddx.run_folder import SAMPLES, read_samples
from sddx.statistics.intervals import (
    Interval,
    binary,
    crossed_difference,
    flips,
    holm,
    mcnemar,
    paired_difference,
    task_weights,
)

Samples = Mapping[str, Mapping[str, Any]]
Pair = tuple[dict[str, Any], dict[str, Any]]  # the summaries of a run and of the one that it is held against


def load_samples(folder: Path, model: str) -> Samples:
    """Scores, item hashes and settings by task of one model of a run (`samples.json`). Raises UserError."""
    models = read_samples(folder)
    if model not in models:
        raise UserError(f"{folder} has no scores of the {model} model; it has {', '.join(models)}.")
    return models[model]


def check_comparable(first: Samples, second: Samples) -> None:
    """Raise UserError, with every reason, where tasks, settings (template, shots, ...) or items differ."""
    reasons = [f"{task} is in one of the two only" for task in first.keys() ^ second.keys()]
    for task in first.keys() & second.keys():
        other = difference(*(flatten(each[task]["settings"]) for each in (first, second)))
        other.pop("limit", None)  # as runs had it once: the items themselves decide
        reasons += [f"{task}: {name} is {a} and {b}" for name, (a, b) in other.items()]
        a, b = first[task]["hashes"], second[task]["hashes"]
        if a != b:
            shared = len(set(a) & set(b))
            reasons.append(f"{task}: the items differ ({len(a)} and {len(b)}, {shared} in common)")
    if reasons:
        raise UserError(
            "These runs cannot be compared:\n  "
            + "\n  ".join(sorted(reasons))
            + "\nEvaluate both with the same tasks and settings."
        )


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Names under which two flat mappings differ, with both values (None where a name is missing)."""
    names = dict.fromkeys([*first, *second])
    both = {name: (first.get(name), second.get(name)) for name in names}
    return {name: (a, b) for name, (a, b) in both.items() if a != b}


def compare(first: Samples, second: Samples) -> dict[str, Any]:
    """Paired differences, second - first: {"tasks": {task: {...}}, "average": Interval, "measures": {name: {task or
    "average": Interval}}}.

    A task has `difference` (an Interval over items, or over clusters of items where it has any) and, for binary
    scores only (else None), `flipped` = (right to wrong, wrong to right), `p` and `p_holm`; no p where items are in
    clusters, since the test takes them as independent. Tasks that stand apart are in no average. Raises UserError
    where the two cannot be compared.
    """
    check_comparable(first, second)
    tasks = {task: _task(first[task], second[task]) for task in first}
    tested = [task for task in tasks if tasks[task]["p"] is not None]
    for task, p in zip(tested, holm([tasks[task]["p"] for task in tested]), strict=True):
        tasks[task]["p_holm"] = p
    measures = {name: _measured(first, second, name) for name in MEASURES}
    return {
        "tasks": tasks,
        "average": _average(first, second, "scores", list(first)),
        "measures": {name: by_task for name, by_task in measures.items() if by_task},
    }


def _measured(first: Samples, second: Samples, measure: str) -> dict[str, Interval]:
    """The difference of a measure by task, for tasks that have it in both, and on their average."""
    having = [task for task in first if first[task].get(measure) and second[task].get(measure)]
    by_task = {task: _difference(first, second, measure, [task]) for task in having}
    return by_task | ({"average": average} if (average := _average(first, second, measure, having)) else {})


def _average(first: Samples, second: Samples, what: str, tasks: Sequence[str]) -> Interval | None:
    counted = [task for task in tasks if not first[task].get("apart")]
    return _difference(first, second, what, counted) if counted else None


def _difference(first: Samples, second: Samples, what: str, tasks: Sequence[str]) -> Interval:
    before, after = ({task: samples[task][what] for task in tasks} for samples in (first, second))
    weights = task_weights(tasks, {task: first[task]["part_of"] for task in tasks})
    clusters = {task: first[task].get("clusters") for task in tasks}
    return paired_difference([after], [before], weights=weights, clusters=clusters)


def _task(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    before, after = first["scores"], second["scores"]
    judged = binary(before) and binary(after)
    return {
        "difference": _difference({"": first}, {"": second}, "scores", [""]),
        "p": mcnemar(before, after) if judged and not first.get("clusters") else None,
        "p_holm": None,
        "flipped": flips(before, after) if judged else None,
    }


def over_pairs(pairs: Sequence[Pair], role: str, without: Collection[str] = ()) -> Interval | None:
    """Averages of the models of a role, first - second, over pairs of runs that differ in their seed alone: shares,
    over seeds, or over items where there is one pair. `without` names reported tasks to leave out of the average.
    None where no task is left, or where a run has no samples or was evaluated on other items."""
    if (found := _sides(pairs, role, without)) is None:
        return None
    sides, how = found
    if role == "cut":  # the same for every seed of training
        sides = [side[:1] for side in sides]
    return paired_difference(*sides, **how)


def over_both(pairs: Sequence[Pair], role: str) -> Interval | None:
    """As `over_pairs`, over seeds and items. None also where there is one pair, or a task of one
    item or cluster."""
    if len(pairs) < 2 or (found := _sides(pairs, role, ())) is None:
        return None
    sides, how = found
    with suppress(ValueError):
        return crossed_difference(*sides, **how)
    return None


def _sides(pairs: Sequence[Pair], role: str, without: Collection[str]) -> tuple[Any, dict[str, Any]] | None:
    """What every item scored, by task, in the first and in the second run of each pair, and how tasks weigh and
    items belong together."""
    sides: Any = [[samples_of(run, role) for run in side] for side in zip(*pairs, strict=True)]
    items = {(task, *record["hashes"]) for side in sides for scores in side for task, record in scores.items()}
    if not all(scores for side in sides for scores in side) or len(items) > len(sides[0][0]):
        return None
    counted = {task: record for task, record in in_average(sides[0][0]).items() if record["part_of"] not in without}
    if not counted:
        return None
    scores = [[{task: run[task]["scores"] for task in counted} for run in side] for side in sides]
    clusters = {task: record.get("clusters") for task, record in counted.items()}
    return scores, {"weights": task_weights(list(counted), pairs[0][0].get("part_of")), "clusters": clusters}


def samples_of(run: Mapping[str, Any], role: str) -> Samples:
    """Every item's score and hash by task, from the file beside the run's summary; empty where it has none that can
    be read."""
    folder = Path(run.get("folder", ""))
    with suppress(UserError, OSError):
        written = (folder / SAMPLES).stat().st_mtime_ns
        return _samples(folder, written).get(having(run, role) or "", {})
    return {}


@lru_cache(maxsize=128)
def _samples(folder: Path, written: int) -> Mapping[str, Samples]:
    """A report asks for those of one run once for every arm, seed and measure."""
    return read_samples(folder)


def in_average(samples: Samples) -> Samples:
    """The tasks that count in the average: those that do not stand apart."""
    return {task: record for task, record in samples.items() if not record.get("apart")}
