"""From runs to curves and comparisons: what varies becomes an axis, seeds become bands."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from scipy.stats import ttest_1samp

from sddx.evaluation.statistics import Interval, holm, t_interval

Run = dict[str, Any]  # the fields of a summary.json
# What can be the horizontal axis of a curve, with its label.
AXES = {
    "removed": "blocks (or branches) removed",
    "size": "training examples",
    "shift": "share of references in a foreign style",
    "rank": "LoRA rank",
    "learning_rate": "learning rate",
}
# Settings that an arm may have for itself: a fair comparison gives each arm its own learning rate (science.md).
OWN = ("learning_rate",)
# What can stand in place of the arm where it varies: how the cut was chosen, what was cut, what stands in for it.
VARIANTS = {"pruning": "metric", "units": "units", "patch": "patch"}
# What is drawn over an axis: held-out skills first, because the trained one carries most of any average.
MEASURES = {
    "recovery_held_out": "Recovery on skills that were not trained on",
    "recovery_trained": "Recovery on skills that were trained on",
    "recovery": "Recovery, all skills",
    "gap_closed": "Gap closed",
}


@dataclass(frozen=True)
class Point:
    """One place on a curve: the mean over its runs, with an interval over seeds (or over items, for one run)."""

    x: float
    interval: Interval
    seeds: int


@dataclass(frozen=True)
class Family:
    """Runs that differ in one axis, arm and seed alone; `fixed` is what they have in common and others do not."""

    axis: str
    fixed: str
    runs: list[Run]

    @property
    def arms(self) -> list[str]:
        return losses(self.runs)

    def pruned(self) -> list[tuple[float, float]]:
        """The recovery of the pruned model before any training, along the axis."""
        return sorted({run["choices"][self.axis]: run["pruned_recovery"] for run in self.runs}.items())

    def curve(self, arm: str, measure: str) -> list[Point]:
        """The points of one arm, along the axis; without places where the measure is not defined."""
        at: dict[float, list[Run]] = defaultdict(list)
        for run in self.runs:
            if run["choices"]["loss"] == arm and run.get(measure) is not None:
                at[run["choices"][self.axis]].append(run)
        return [Point(x, _interval(runs, measure), len(runs)) for x, runs in sorted(at.items())]


def _interval(runs: Sequence[Run], measure: str) -> Interval:
    values = [run[measure] for run in runs]
    if len(values) > 1:
        return t_interval(values)
    if measure == "recovery":
        return Interval(values[0], runs[0]["recovery_low"], runs[0]["recovery_high"], "items")
    return Interval(values[0], values[0], values[0], "nothing")


def families(runs: Sequence[Run]) -> list[Family]:
    """The curves that these runs can draw: for every axis, the runs that share all other choices."""
    found = []
    for axis in AXES:
        groups = _alike([run for run in runs if run["choices"].get(axis) is not None], axis, "loss", "seed")
        drawn = {key: group for key, group in groups.items() if len({r["choices"][axis] for r in group}) > 1}
        found += [Family(axis, _apart(key, list(drawn)), group) for key, group in drawn.items()]
    return found


def losses(runs: Sequence[Run]) -> list[str]:
    """The arms of these runs: SFT before those that are held against it."""
    return sorted({run["choices"]["loss"] for run in runs}, key=lambda arm: (arm != "sft", arm))


def _alike(runs: Sequence[Run], *apart_from: str) -> dict[tuple, list[Run]]:
    """Runs by all their choices but these. A setting that every arm has one value of belongs to the arm, not to
    what tells the groups apart."""
    if "loss" in apart_from:
        apart_from += tuple(name for name in OWN if _is_own(runs, name))
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        others = [(name, _plain(value)) for name, value in run["choices"].items() if name not in apart_from]
        groups[tuple(sorted(others))].append(run)
    return groups


def _is_own(runs: Sequence[Run], setting: str) -> bool:
    values: dict[str, set] = defaultdict(set)
    for run in runs:
        values[run["choices"]["loss"]].add(run["choices"].get(setting))
    return all(len(found) == 1 for found in values.values())


def _plain(value: Any) -> str:
    """A choice in words; 1 and 1.0 are the same one."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _apart(key: tuple, keys: Sequence[tuple]) -> str:
    """What tells this group from the others, in words."""
    shared = set(key).intersection(*map(set, keys))
    return ", ".join(f"{name} {value}" for name, value in key if (name, value) not in shared)


@dataclass(frozen=True)
class Difference:
    """An arm against SFT, paired by seed, in points; p is adjusted by Holm over the column that it stands in."""

    where: str
    arm: str
    seeds: int
    average: Interval
    held_out: Interval
    p_average: float
    p_held_out: float


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Every arm against SFT, wherever both were run with two seeds in common and all else equal."""
    pairs = list(_pairs(runs))
    columns = [[_paired(arm, base, score) for *_, arm, base in pairs] for score in (average, held_out)]
    adjusted = [holm([p for _, p in column]) for column in columns]
    return [
        Difference(where, arm, len(ours), columns[0][n][0], columns[1][n][0], adjusted[0][n], adjusted[1][n])
        for n, (where, arm, ours, _) in enumerate(pairs)
    ]


def _pairs(runs: Sequence[Run]) -> Iterator[tuple[str, str, list[Run], list[Run]]]:
    """(where, arm, its runs, those of SFT with the same seeds)."""
    groups = _alike(runs, "loss", "seed")
    for key, group in sorted(groups.items()):
        seeded = {(run["choices"]["loss"], run["choices"]["seed"]): run for run in group}
        for arm in losses(group):
            seeds = sorted(seed for loss, seed in seeded if loss == arm and ("sft", seed) in seeded)
            if arm != "sft" and len(seeds) > 1:
                where = _apart(key, list(groups)) or "all runs"
                yield where, arm, [seeded[arm, seed] for seed in seeds], [seeded["sft", seed] for seed in seeds]


def _paired(arm: Sequence[Run], base: Sequence[Run], score: Callable[[Run], float]) -> tuple[Interval, float]:
    points = [100 * (score(ours) - score(theirs)) for ours, theirs in zip(arm, base, strict=True)]
    # With the same difference in every seed the t test has no variance to divide by.
    p = float(ttest_1samp(points, 0).pvalue) if len(set(points)) > 1 else float(points[0] == 0)
    return t_interval(points), p


def average(run: Run) -> float:
    """The recovered model's average over all tasks."""
    return run["scores"]["recovered"]["average"]


def held_out(run: Run) -> float:
    """The recovered model's average over the tasks that were not trained on."""
    scores = run["scores"]["recovered"]
    return mean(score for task, score in scores.items() if task not in (*run["trained"], "average"))


def arms(runs: Sequence[Run]) -> list[tuple[str, str, list[Run]]]:
    """(where, arm, runs) for every set of runs that differ in their seed alone."""
    groups = _alike(runs, "loss", "seed")
    along = sorted(groups.items(), key=lambda entry: [entry[1][0]["choices"].get(axis) or 0 for axis in AXES])
    return [
        (_apart(key, list(groups)) or "all runs", arm, [run for run in group if run["choices"]["loss"] == arm])
        for key, group in along
        for arm in losses(group)
    ]


def variants(runs: Sequence[Run], choice: str) -> dict[tuple[str, str], dict[float, list[Run]]]:
    """Runs that differ in one of `VARIANTS`, in how much was removed and in their seed alone: by (where, the
    choice), then by how much was removed. Empty where that choice does not vary."""
    found: dict[tuple[str, str], dict[float, list[Run]]] = {}
    groups = _alike([run for run in runs if run["choices"].get(choice)], choice, "removed", "seed")
    varying = {key: group for key, group in groups.items() if len({r["choices"][choice] for r in group}) > 1}
    for key, group in varying.items():
        for name in dict.fromkeys(run["choices"][choice] for run in group):
            counts: dict[float, list[Run]] = defaultdict(list)
            for run in group:
                if run["choices"][choice] == name:
                    counts[run["choices"]["removed"]].append(run)
            found[_apart(key, list(varying)), name] = dict(sorted(counts.items()))
    return found
