"""Arms held against SFT: paired differences on the same items and seeds, and the sentence that they allow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from typing import Any

from sddx.report.curves import Run, alike, distinction, is_trained, losses
from sddx.report.extraction import Key, Reading, named, read_variously, readings
from sddx.report.paired import in_average, over_both, over_pairs, samples_of
from sddx.report.subjects import having
from sddx.report.table import is_choosing
from sddx.statistics.intervals import Interval, holm, t_interval

Runs = Sequence[Run]
Compared = tuple[Interval | None, float | None]  # a difference in points, and its p


@dataclass(frozen=True)
class Difference:
    """An arm minus SFT, paired by seed, in points. The interval is over seeds, or over `items` where there is one
    seed; p, of the t test over seeds, is adjusted by Holm over the column that it stands in. `both` is the average
    again, over seeds and items, where the items are at hand. Where every task was trained on, nothing is held out.
    `equal` names what the arms had as much of; `writes`: whether students of either wrote in their training, so
    that seconds count too."""

    where: str
    arm: str
    seeds: int
    tasks: int
    items: int | None
    average: Interval
    held_out: Interval | None
    p_average: float | None
    p_held_out: float | None
    both: Interval | None
    equal: frozenset[str]
    writes: bool = False


def differences(runs: Runs) -> list[Difference]:
    """Every arm minus SFT, wherever both were run with a seed in common and all else equal. Pairs of one seed whose
    samples are not at hand have no interval and are left out."""
    unadjusted, kinds = [], []
    for where, arm, ours, theirs in _pairs(runs, seeds=1):
        whole, others = _averaged(ours, theirs), _held_out(ours, theirs)
        if whole[0] is not None:
            about = where, arm, len(ours), len(_tasks(ours[0])), _items(ours[0])
            measured = whole[0], others[0], whole[1], others[1], _over_both(ours, theirs)
            unadjusted.append(Difference(*about, *measured, *_equal(ours, theirs)))
            kinds.append(is_choosing(ours[0]))
    columns = [_holm([getattr(d, name) for d in unadjusted], kinds) for name in ("p_average", "p_held_out")]
    return [replace(d, p_average=a, p_held_out=h) for d, a, h in zip(unadjusted, *columns, strict=True)]


def _averaged(arm: Runs, base: Runs) -> Compared:
    return _paired(arm, base, average) if len(arm) > 1 else _of_one_seed(arm[0], base[0])


def _held_out(arm: Runs, base: Runs) -> Compared:
    """The same over the tasks that were not trained on, where every run has any."""
    if any(held_out(run) is None for run in (*arm, *base)):
        return None, None
    return _paired(arm, base, held_out) if len(arm) > 1 else _of_one_seed(arm[0], base[0], arm[0]["trained"])


def _of_one_seed(arm: Run, base: Run, without: Sequence[str] = ()) -> Compared:
    """Over items: what another training run would give is not in it, so that there is no test."""
    shares = over_pairs([(arm, base)], "student", without)
    return shares and _in_points(shares), None


def _over_both(arm: Runs, base: Runs) -> Interval | None:
    shares = over_both(list(zip(arm, base, strict=True)), "student")
    return shares and _in_points(shares)


def _in_points(shares: Interval) -> Interval:
    return replace(shares, **{end: 100 * getattr(shares, end) for end in ("estimate", "low", "high")})


def _items(run: Run) -> int | None:
    """How many items the average is over; None where that is not at hand."""
    return sum(len(record["scores"]) for record in in_average(samples_of(run, "student")).values()) or None


def _equal(arm: Runs, base: Runs) -> tuple[frozenset[str], bool]:
    """What both arms trained on as much of, to a hundredth (a budget of tokens ends with a whole step), and for as
    long, to a tenth; and whether either wrote."""
    sums = {name: [sum(run.get(name) or 0 for run in side) for side in (arm, base)] for name in (*COUNTED, TIMED)}
    apart = {name: abs(ours - theirs) / max(ours, theirs, 1e-9) for name, (ours, theirs) in sums.items()}
    equal = frozenset(name for name, share in apart.items() if share <= (0.1 if name == TIMED else 0.01))
    return equal, any(run.get("rollouts") for run in (*arm, *base))


COUNTED, TIMED = ("examples", "supervised_tokens"), "training_seconds"


@dataclass(frozen=True)
class ReadingDifference:
    """An arm minus SFT in one task's score under one filter, paired by seed, in points; p is adjusted by Holm over
    all of them."""

    where: str
    arm: str
    seeds: int
    task: str
    read_by: str
    interval: Interval
    p: float | None


def reading_differences(runs: Runs) -> list[ReadingDifference]:
    """As `differences`, over two seeds at least, for every task whose answers can be read in several ways, or not
    at all."""
    unadjusted, kinds = [], []
    tasks = read_variously(runs)
    for where, arm, ours, theirs in _pairs(runs, seeds=2):
        for key in _readings(ours[0], tasks):
            if all(key in _readings(run, tasks) for run in (*ours, *theirs)):
                interval, p = _paired(ours, theirs, partial(_read_by, key))
                unadjusted.append(
                    ReadingDifference(where, arm, len(ours), key[0], named(ours[0], key), interval, p)
                )
                kinds.append(is_choosing(ours[0]))
    adjusted = _holm([difference.p for difference in unadjusted], kinds)
    return [replace(difference, p=p) for difference, p in zip(unadjusted, adjusted, strict=True)]


def _readings(run: Run, tasks: Collection[str]) -> dict[Key, Reading]:
    return readings(run, tasks).get(having(run, "student") or "", {})


def _read_by(key: Key, run: Run) -> float:
    return _readings(run, key[:1])[key].score


def _pairs(runs: Runs, *, seeds: int) -> Iterator[tuple[str, str, list[Run], list[Run]]]:
    """(where, arm, its runs, those of SFT with the same seeds), of runs that trained, where both have at least so
    many `seeds` in common."""
    groups = alike([run for run in runs if is_trained(run)], "loss", "seed")
    for key, group in sorted(groups.items()):
        seeded = {(run["choices"]["loss"], run["choices"]["seed"]): run for run in group}
        for arm in losses(group):
            both = (seed for loss, seed in seeded if loss == arm and ("sft", seed) in seeded)
            common = sorted(seed for seed in both if _on_the_same_items(seeded[arm, seed], seeded["sft", seed]))
            if arm != "sft" and len(common) >= seeds:
                where = distinction(key, list(groups)) or "all runs"
                yield where, arm, [seeded[arm, seed] for seed in common], [seeded["sft", seed] for seed in common]


def _on_the_same_items(ours: Run, theirs: Run) -> bool:
    """By the tasks in the average, and by their items where these are at hand."""
    items = [{task: each["hashes"] for task, each in samples_of(run, "student").items()} for run in (ours, theirs)]
    same = items[0] == items[1] or not all(items)
    return same and _tasks(ours).keys() == _tasks(theirs).keys()


def _holm(p_values: Sequence[float | None], kinds: Sequence[bool]) -> list[float | None]:
    """Holm's adjustment of those that are defined, over each kind apart: nothing is claimed of runs on items for
    choosing, so that these cost the others nothing."""
    adjusted: list[float | None] = [None] * len(p_values)
    for kind in set(kinds):
        known = {place: p for place, p in enumerate(p_values) if p is not None and kinds[place] is kind}
        for place, p in zip(known, holm(list(known.values())), strict=True):
            adjusted[place] = p
    return adjusted


def _paired(arm: Runs, base: Runs, score: Callable[[Run], Any]) -> tuple[Interval, float | None]:
    from scipy.stats import ttest_1samp

    points = [100 * (score(ours) - score(theirs)) for ours, theirs in zip(arm, base, strict=True)]
    # With the same difference in every seed, to rounding, the t test has no variance to divide by.
    defined = max(points) - min(points) > 1e-9
    return t_interval(points), float(ttest_1samp(points, 0).pvalue) if defined else None


def average(run: Run) -> float:
    """The recovered model's average over all tasks that count in it."""
    return _recovered(run)["average"]


def held_out(run: Run) -> float | None:
    """The recovered model's average over the tasks that were not trained on; None where there is none."""
    scores = [score for task, score in _tasks(run).items() if task not in run["trained"]]
    return mean(scores) if scores else None


def _tasks(run: Run) -> dict[str, float]:
    """The recovered model's scores of the tasks that count in its average."""
    left_out = (*run.get("apart", ()), "average")
    return {task: score for task, score in _recovered(run).items() if task not in left_out}


def _recovered(run: Run) -> dict[str, float]:
    return run["scores"][having(run, "student") or ""]
