"""From runs to curves and variants: what varies becomes an axis, seeds become bands."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from sddx.config.parents import at_seed, is_of_merging
from sddx.records import STUDENTS
from sddx.report.paired import Pair, over_pairs
from sddx.report.subjects import having, roles
from sddx.statistics.intervals import Interval, t_interval

Run = dict[str, Any]  # the fields of a summary.json
# What can be the horizontal axis of a curve, with its label.
AXES = {
    "removed": "blocks removed",
    "size": "training examples",
    "shift": "share of references in a foreign style",
    "rank": "LoRA rank",
    "learning_rate": "learning rate",
}
# Settings that an arm may have for itself: a fair comparison gives each arm a learning rate of its own (see
# docs/science.md), equal tokens or seconds can take another budget in each, and only some have a teacher, learn
# from answers that are written, or have something in their loss to set.
BUDGET = ("budget", "epochs", "tokens", "steps")
OWN = ("learning_rate", *BUDGET, "loss", "teacher_cache", "generation", "selfdata")
# What can stand in place of the arm where it varies (how the cut was chosen, what was cut, what stands in for it),
# with its label, the choices that belong to it, and what the others are held against.
VARIANTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "pruning": ("metric", ("keep", "oracle"), "angular"),
    "units": ("units", (), "attention"),
    "patch": ("patch", ("patch_rank", "patch_trained", "patch_fold"), "none"),
}
DRAWS = {"pruning": ("cut_seed",)}  # choices that only some variants have
# What is drawn over an axis: held-out skills first, because the trained one carries most of any average.
MEASURES = {
    "recovery_held_out": "Recovery on skills that were not trained on",
    "recovery_trained": "Recovery on skills that were trained on",
    "recovery": "Recovery, all skills",
    "gap_closed": "Gap closed",
}
# The same for runs that trained nothing: what a cut costs.
KEPT = {"pruned_recovery": "Kept without training", "text.pruned.perplexity": "Perplexity on held-out text"}


def is_share(measure: str) -> bool:
    """Whether a measure is a share, shown in percent; else it is a perplexity."""
    return not measure.endswith("perplexity")


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
    def label(self) -> str:
        """What stands at the horizontal axis."""
        return removed_label(self.runs) if self.axis == "removed" else AXES[self.axis]

    @property
    def arms(self) -> list[str]:
        """The arms of these runs, SFT first."""
        return losses(self.runs)

    @property
    def measures(self) -> dict[str, str]:
        """What there is to draw: recoveries where any run trained, else what the cut left."""
        return MEASURES if any(map(is_trained, self.runs)) else KEPT

    def pruned(self) -> list[tuple[float, float]]:
        """The recovery of the pruned model before any training, along the axis; without places where it is not
        defined, as the unpruned model scored nothing."""
        defined = [run for run in self.runs if run["pruned_recovery"] is not None]
        return sorted({run["choices"][self.axis]: run["pruned_recovery"] for run in defined}.items())

    def curve(self, arm: str, measure: str) -> list[Point]:
        """The points of one arm, along the axis; without places where the measure is not defined."""
        at: dict[float, list[Run]] = defaultdict(list)
        for run in self.runs:
            if run["choices"]["loss"] == arm and value_of(run, measure) is not None:
                at[run["choices"][self.axis]].append(run)
        role = "cut" if measure in KEPT else "student"
        models = {x: _models(runs, role) for x, runs in sorted(at.items())}
        return [Point(x, interval_of(runs, measure), len(runs)) for x, runs in models.items()]


def _models(runs: Sequence[Run], role: str) -> list[Run]:
    """One run for each model of a role that was evaluated: seeds of training make no other of a pruned one."""
    keys = {run["artifacts"].get(f"evaluate_{having(run, role)}", number): run for number, run in enumerate(runs)}
    return list(keys.values())


def interval_of(records: Sequence[Mapping[str, Any]], measure: str) -> Interval:
    """A measure of runs, or of one model's `recoveries` in them: over seeds, of one seed over items where that is
    known, else as it is."""
    values = [value_of(record, measure) for record in records]
    if len(values) > 1:
        return t_interval(values)
    # Where the unpruned model may score nothing in a draw of items, recovery has no interval.
    if measure == "recovery" and records[0]["recovery_low"] is not None:
        return Interval(values[0], records[0]["recovery_low"], records[0]["recovery_high"], "items")
    return Interval(values[0], values[0], values[0], "nothing")


def is_trained(run: Run) -> bool:
    """Whether the run recovered anything, or evaluated the pruned model alone."""
    return having(run, "student") is not None


def value_of(run: Mapping[str, Any], name: str) -> Any:
    """A field of a run by its dotted name; None where there is none."""
    value: Any = run
    for part in name.split("."):
        value = (value or {}).get(part)
    return value


def mean_of(runs: Sequence[Run], name: str) -> float | None:
    """The mean of a number over the runs that have it."""
    values = [run[name] for run in runs if run.get(name) is not None]
    return mean(values) if values else None


def score_of(runs: Sequence[Run], model: str, task: str) -> str:
    """The mean score of a task, in per cent."""
    values = [scores[task] for run in runs if task in (scores := run["scores"].get(model, {}))]
    return f"{100 * mean(values):.1f}" if values else "-"


def perplexity_of(runs: Sequence[Run], model: str) -> str:
    """The mean perplexity on held-out text."""
    texts = [run.get("text", {}).get(model, {}) for run in runs]
    values = [text["perplexity"] for text in texts if text.get("perplexity") is not None]
    return f"{mean(values):,.2f}" if values else "-"


def removed_label(runs: Sequence[Run]) -> str:
    """What was removed: blocks, or branches too."""
    kinds = {run["choices"].get("units") or "blocks" for run in runs}
    return AXES["removed"] if kinds == {"blocks"} else "units removed"


def families(runs: Sequence[Run]) -> list[Family]:
    """The curves that these runs can draw: for every axis, the runs that share all other choices."""
    drawable = []
    for axis in AXES:
        groups = alike([run for run in runs if run["choices"].get(axis) is not None], axis, "loss", "seed")
        drawn = {key: group for key, group in groups.items() if not _one_each(group, axis)}
        drawable += [Family(axis, distinction(key, list(drawn)), group) for key, group in drawn.items()]
    return drawable


def losses(runs: Sequence[Run]) -> list[str]:
    """The arms of these runs: SFT before those that are held against it."""
    return sorted({run["choices"]["loss"] for run in runs}, key=lambda arm: (arm != "sft", arm))


# What a choice is where a run does not name it: runs from before it could be named.
DEFAULTS = {"units": "blocks", "patch": "none", "patch_trained": False, "patch_fold": False, "oracle": False}


def alike(runs: Sequence[Run], *besides: str, merges: Sequence[str] | None = ()) -> dict[tuple, list[Run]]:
    """Runs by all their choices but these. A setting in `OWN` of which every arm of a group has one value belongs
    to the arm, and rows that each seed drew for itself (dataset.seed=${seed}) to the seed, not to what tells groups
    apart. Nor does what students become: of runs that differ in that alone there is one, but for those of its
    choices that `merges` names (None: all)."""
    runs = runs if merges is None else unmerged(runs, *merges)
    names = {name for run in runs for name in run["choices"] if name.split(".")[0] in OWN} - {"loss"}
    own = sorted(names) if "loss" in besides else []
    rows = [ROWS] if "seed" in besides else []
    groups: dict[tuple, list[Run]] = {}
    for group in _grouped(runs, *besides, *own, *rows).values():
        for bound, those in _by_their_rows(group, own).items():
            left_out = [*besides, *(rows if bound else [])]
            for key, same in _grouped(those, *left_out, *own).items():
                kept = [name for name in own if _one_each(same, name)]
                groups |= _grouped(same, *left_out, *kept) if len(kept) < len(own) else {key: same}
    return groups


ROWS = "dataset_seed"


def unmerged(runs: Sequence[Run], *kept: str) -> list[Run]:
    """Runs without their choices of merging but for those that are `kept`, each student that was merged once: what
    students become says nothing of what they are. Of several runs the one that looked at most models stays."""
    groups: dict[str, list[tuple[bool, Run]]] = defaultdict(list)
    for run in runs:
        choices = {name: v for name, v in run["choices"].items() if name in kept or not is_of_merging(name)}
        key = json.dumps([choices, run["artifacts"].get("train")], sort_keys=True)
        groups[key].append((len(choices) < len(run["choices"]), {**run, "choices": choices}))
    for key, group in groups.items():
        if any(merges for merges, _ in group):
            groups[key] = [max(group, key=lambda each: len(roles(each[1])))]
    return [run for group in groups.values() for _, run in group]


def _by_their_rows(runs: Sequence[Run], own: Sequence[str]) -> dict[bool, list[Run]]:
    """Runs of arms in which every seed drew rows of its own, several of them, and all others."""
    by_arm: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        by_arm[tuple(run["choices"].get(name) for name in ("loss", *own))].append(run)
    parted: dict[bool, list[Run]] = defaultdict(list)
    for those in by_arm.values():
        drawn = {(run["choices"].get("seed"), run["choices"].get(ROWS)) for run in those}
        parted[len(drawn) > 1 and all(seed == rows for seed, rows in drawn)] += those
    return parted


def _grouped(runs: Sequence[Run], *besides: str) -> dict[tuple, list[Run]]:
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        chosen = {name: value for name, value in run["choices"].items() if value is not None}
        others = [(name, _plain(v)) for name, v in (DEFAULTS | chosen).items() if name not in besides]
        groups[tuple(sorted(others))].append(run)
    return groups


def _one_each(runs: Sequence[Run], setting: str) -> bool:
    """Whether every arm has one value of a setting."""
    values: dict[str, set] = defaultdict(set)
    for run in runs:
        values[run["choices"]["loss"]].add(run["choices"].get(setting))
    return all(len(each) == 1 for each in values.values())


def _plain(value: Any) -> str:
    """A choice in words; 1 and 1.0 are the same one."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def distinction(key: tuple, keys: Sequence[tuple]) -> str:
    """What tells this group from the others, in words."""
    shared = set(key).intersection(*map(set, keys))
    return ", ".join(f"{name} {value}" for name, value in key if (name, value) not in shared)


def arms(runs: Sequence[Run], merges: Sequence[str] | None = ()) -> list[tuple[str, str, list[Run]]]:
    """(where, arm, runs) for every set of runs that differ in their seed alone, or beside it in choices of merging
    that are not in `merges` (see `alike`)."""
    groups = alike(runs, "loss", "seed", merges=merges)
    along = sorted(groups.items(), key=lambda entry: (_place(entry[1][0]), entry[0]))
    return [
        (distinction(key, list(groups)) or "all runs", arm, [run for run in group if run["choices"]["loss"] == arm])
        for key, group in along
        for arm in losses(group)
    ]


# By role what of a merge tells models of that role apart.
TOLD_APART: dict[str, Sequence[str] | None] = {"parent": (STUDENTS,), "mixed": (STUDENTS,), "merged": None}


def judged(runs: Sequence[Run]) -> Iterator[tuple[str, str, str, str, list[Run]]]:
    """(where, arm, role, name, runs) of every model that was evaluated, over the seeds of its arm; what is the same
    in several merges once. A student that is named by the seed has one name in all of these runs."""
    for merges in ((), (STUDENTS,), None):
        for where, arm, group in arms(runs, merges):
            group = [_named_alike(run) for run in group]
            for name, role in {name: role for run in group for name, role in roles(run).items()}.items():
                if TOLD_APART.get(role, ()) == merges:
                    yield where, arm, role, name, [run for run in group if name in roles(run)]


def _named_alike(run: Run) -> Run:
    """A run in which students that were asked for by its seed, seed=1${seed}, are called so."""
    asked = run["choices"].get(STUDENTS) or []
    names = {called(each, run): each for each in asked if each != called(each, run)}
    if not names:
        return run
    renamed = {
        field: {names.get(name, name): each for name, each in value.items()} if isinstance(value, dict) else value
        for field, value in run.items()
    }
    subjects = [{**each, "name": names.get(each["name"], each["name"])} for each in run.get("subjects", ())]
    return {**renamed, "subjects": subjects}


def called(student: str, run: Run) -> str:
    """What a run calls a student that it merges."""
    return at_seed(student, run["choices"]["seed"])


def seed_of(run: Run, name: str) -> int:
    """The seed that a model of a run hangs on: of the pruned one that which drew the rows it is tried on, since no
    training made it."""
    return (run["choices"].get(ROWS) or 0) if roles(run)[name] == "cut" else run["choices"]["seed"]


def _place(run: Run) -> list[float]:
    return [run["choices"].get(axis) or 0 for axis in AXES]


@dataclass(frozen=True)
class Variant:
    """Runs with one metric, kind of unit or patch, by how much was removed; `where` is what tells them from others
    that differ in more."""

    where: str
    name: str
    runs: dict[float, list[Run]]


def variants(runs: Sequence[Run], choice: str) -> list[Variant]:
    """Runs that differ in one of `VARIANTS`, in how much was removed and in their seed alone. Empty where that
    choice does not vary."""
    _, details, _ = VARIANTS[choice]
    cut = [run for run in runs if run["choices"].get(choice) and run["choices"]["removed"]]
    groups = alike(cut, choice, *details, *DRAWS.get(choice, ()), "removed", "seed")
    named = [(key, _by_variant(group, choice, details)) for key, group in groups.items()]
    varying = [(key, names) for key, names in named if len(names) > 1]
    keys = [key for key, _ in varying]
    return [
        Variant(distinction(key, keys), name, places) for key, names in varying for name, places in names.items()
    ]


def _by_variant(runs: Sequence[Run], choice: str, details: Sequence[str]) -> dict[str, dict[float, list[Run]]]:
    """Runs by the name of the variant, with those of its details that vary under that name, then by how much was
    removed."""
    by_name: dict[str, dict[float, list[Run]]] = {}
    for name in dict.fromkeys(run["choices"][choice] for run in runs):
        own = [run for run in runs if run["choices"][choice] == name]
        varies = [d for d in details if len({_plain(run["choices"].get(d)) for run in own}) > 1]
        if name == VARIANTS[choice][2]:
            varies = []  # what the others are held against has no details
        for run in own:
            parts = [f"{detail.split('_')[-1]}={_plain(run['choices'].get(detail))}" for detail in varies]
            places = by_name.setdefault(" ".join([name, *parts]), {})
            places.setdefault(run["choices"]["removed"], []).append(run)
    return {name: dict(sorted(places.items())) for name, places in by_name.items()}


@dataclass(frozen=True)
class VariantDifference:
    """A variant minus the one that it is held against: shares of the average, on the same items and seeds, before
    and after training (None: nothing was trained)."""

    where: str
    name: str
    removed: float
    seeds: int
    draws: int
    before: Interval
    after: Interval | None


def variant_differences(runs: Sequence[Run], choice: str) -> list[VariantDifference]:
    """Every variant against the first one named in `VARIANTS`, wherever both removed as much with a seed in
    common. Several draws of what is cut: intervals over draws; else several seeds: over seeds; else over items.
    Runs without samples, or with other items, are left out."""
    base, differences = VARIANTS[choice][2], []
    everything = variants(runs, choice)
    bases = {variant.where: variant for variant in everything if variant.name == base}
    for variant in (variant for variant in everything if variant.name != base and variant.where in bases):
        for removed, own in variant.runs.items():
            draws = _by_draw(own, bases[variant.where].runs.get(removed, []), choice)
            before, after = (_over_draws(draws, role) for role in ("cut", "student"))
            if before is not None:
                seeds = {run["choices"]["seed"] for pairs in draws for run, _ in pairs}
                about = variant.where, variant.name, removed, len(seeds), len(draws)
                differences.append(VariantDifference(*about, before, after))
    return differences


def _by_draw(own: Sequence[Run], others: Sequence[Run], choice: str) -> list[list[Pair]]:
    """Runs beside those of the same seed that they are held against, for each draw of what was cut."""
    by_seed = {run["choices"]["seed"]: run for run in others}
    by_draw: dict[tuple, dict[int, Pair]] = defaultdict(dict)
    for run in own:
        if (seed := run["choices"]["seed"]) in by_seed:
            draw = tuple(run["choices"].get(name) for name in DRAWS.get(choice, ()))
            by_draw[draw][seed] = run, by_seed[seed]
    return [list(pairs.values()) for pairs in by_draw.values()]


def _over_draws(draws: Sequence[Sequence[Pair]], role: str) -> Interval | None:
    """The difference in one draw, or the mean over several. All draws are held against the same runs, so that only
    they are independent: each counts once, whatever its seeds."""
    each = [over_pairs(pairs, role) for pairs in draws]
    intervals = [interval for interval in each if interval is not None]
    if not intervals or len(intervals) < len(each):
        return None
    several = len(intervals) > 1
    return replace(t_interval([f.estimate for f in intervals]), contains="draws") if several else intervals[0]
