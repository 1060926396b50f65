"""One sentence of what a set of runs found, by the rules of docs/science.md, or of why they found nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sddx.report.contrasts import COUNTED, TIMED, Difference, differences
from sddx.report.curves import Run, is_trained, losses
from sddx.report.table import is_choosing
from sddx.statistics.intervals import Interval

LEVEL = 0.05
HIGHER, LOWER, SAME = "higher", "lower", "not told apart"


def headline(runs: Sequence[Run]) -> str:
    """How the arms stand to SFT in the average over all tasks: over at least two seeds, on items for reporting,
    with the interval, the seeds and the items. Otherwise why nothing is said."""
    trained = [run for run in runs if is_trained(run)]
    reported = [run for run in trained if not is_choosing(run)]
    arms = losses(reported)
    compared = [d for d in differences(reported) if d.seeds > 1]
    if reason := _silent(trained, reported, arms, compared):
        return f"Nothing is said of arms: {reason}."
    return _one(compared[0]) if len(compared) == 1 else _several(compared)


def _silent(
    trained: Sequence[Run], reported: Sequence[Run], arms: Sequence[str], compared: Sequence[Difference]
) -> str:
    """Why there is nothing to say; empty where there is something."""
    if not trained:
        return "no run trained"
    if not reported:
        return "all runs were evaluated on selection items, which are for choosing"
    if len(arms) == 1:
        return f"{arms[0]} is the only one"
    if "sft" not in arms:
        return f"no run of sft is here to hold {_and(arms)} against"
    if not compared:
        return "none has two seeds in common with sft, and one does not say what another training run would give"
    return ""


def verdict(difference: Difference) -> str:
    """Whether an arm scored higher or lower than SFT. Not told apart are those whose interval holds zero, and those
    whose p, adjusted by Holm over all comparisons, is not below 0.05 or not defined."""
    interval, p = difference.average, difference.p_average
    if interval.low <= 0 <= interval.high or p is None or p >= LEVEL:
        return SAME
    return HIGHER if interval.estimate > 0 else LOWER


def _one(d: Difference) -> str:
    said = verdict(d)
    start = f"{d.arm} and sft are {said}" if said == SAME else f"{d.arm} scored {said} than sft"
    return f"{start} ({_points([d.average])}) in {_about([d])}; {_equal([d])}."


def _several(compared: Sequence[Difference]) -> str:
    arms = dict.fromkeys(d.arm for d in compared)
    said = "; ".join(_arm([d for d in compared if d.arm == arm]) for arm in arms)
    over = f"{_about(compared)}, p adjusted by Holm over {len(compared)} comparisons"
    return f"Held against sft in {over}: {said}; {_equal(compared)}."


def _arm(compared: Sequence[Difference]) -> str:
    """How often an arm scored higher, lower or neither, and by how much where it did."""
    said = []
    for kind in (HIGHER, LOWER, SAME):
        those = [d.average for d in compared if verdict(d) == kind]
        if not those:
            continue
        often = f" in {len(those)} of {len(compared)}" if len(compared) > 1 else ""
        points = f" ({_points(those)})" if kind != SAME or len(compared) == 1 else ""
        said.append(f"{kind}{often}{points}")
    return f"{compared[0].arm} is " + ", ".join(said)


def _points(intervals: Sequence[Interval]) -> str:
    """One difference with its interval, or the span of several estimates."""
    first, *others = intervals
    if others:
        return f"estimates {_span([each.estimate for each in intervals], '{:+.1f}')} points"
    return f"{first.estimate:+.1f} points, {first.low:+.1f} to {first.high:+.1f}"


def _about(compared: Sequence[Difference]) -> str:
    """What the differences are over."""
    items = [d.items for d in compared if d.items]
    counted = f", {_span(items, '{:,}')} items" if items else ""
    tasks, seeds = _span([d.tasks for d in compared], "{}"), _span([d.seeds for d in compared], "{}")
    return f"the average over {tasks} task{'s' * (tasks != '1')} (95 % over {seeds} seeds{counted})"


def _equal(compared: Sequence[Difference]) -> str:
    """What all comparisons hold equal; a claim needs all of it."""
    said = []
    for name in (*COUNTED, *([TIMED] if any(d.writes for d in compared) else [])):
        count = sum(name in d.equal for d in compared)
        share = (
            "equal" if count == len(compared) else f"equal in {count} of {len(compared)}" if count else "unequal"
        )
        said.append(f"{name.replace('_', ' ')} {share}")
    return ", ".join(said)


def _span(values: Sequence[float], form: str) -> str:
    ends = [form.format(value) for value in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends))


def _and(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
