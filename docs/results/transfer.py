"""Whether cuts rank alike on two models: `python docs/results/transfer.py cuts_embedded 2,4 cuts_real 5,10`.

Each NAME is a folder of docs/results/data with untrained runs, and its numbers are counts of removed blocks, which
are compared in their order. For each pair of counts a table of what every cut leaves of both models, and Spearman's
correlation over cuts, where metrics that choose the same blocks on both models count once, and so do all random
draws, by their means; and once more where those count once that do so on either model, which are the fewest points
that can be called independent.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import mean
from typing import Any

from tables import runs

from sddx.report.table import grid
from sddx.statistics.intervals import rank_correlation

Run = dict[str, Any]
MEASURES: dict[str, tuple[Callable[[Run], float], str]] = {
    "average, %": (lambda run: 100 * run["scores"]["pruned"]["average"], ".1f"),
    "bits per byte": (lambda run: run["likelihoods"]["pruned"]["bits_per_byte"]["average"], ".3f"),
}


def by_way(name: str, removed: int) -> dict[str, list[Run]]:
    """The runs that removed so many blocks, by their way of cutting; of random cuts there are several."""
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs(name):
        if run["choices"]["removed"] == removed:
            found[run["choices"]["pruning"]].append(run)
    return found


Sides = Sequence[dict[str, list[Run]]]  # of each model, runs by their way of cutting
Alike = Callable[[Iterable[bool]], bool]  # whether two ways are one cut: on `all` models, or on `any`


def merged(sides: Sides, alike: Alike) -> list[tuple[str, list[list[Run]]]]:
    """The ways of cutting that both models saw, those together that chose the same blocks."""
    groups: list[list[str]] = []
    for way in sorted(set(sides[0]) & set(sides[1])):
        joined = [group for group in groups if any(_is_one_cut(sides, alike, way, other) for other in group)]
        groups = [group for group in groups if group not in joined] + [[*sum(joined, []), way]]
    return [(", ".join(ways), [[run for way in ways for run in side[way]] for side in sides]) for ways in groups]


def _is_one_cut(sides: Sides, alike: Alike, way: str, other: str) -> bool:
    return alike([run["cut"] for run in side[way]] == [run["cut"] for run in side[other]] for side in sides)


def measured(found: Sequence[tuple[str, list[list[Run]]]], place: int, measure: str) -> list[float]:
    """What each cut leaves of one model."""
    return [mean(map(MEASURES[measure][0], both[place])) for _, both in found]


def compare(names: tuple[str, str], counts: tuple[int, int]) -> str:
    """Markdown: a table of both models, and how far the order of one is that of the other."""
    sides = [by_way(name, removed) for name, removed in zip(names, counts, strict=True)]
    found = merged(sides, all)
    columns = [(measure, place) for measure in MEASURES for place in (0, 1)]
    heads = [f"{measure}, {counts[place]} removed of {names[place]}" for measure, place in columns]
    shown = [[format(v, MEASURES[m][1]) for v in measured(found, place, m)] for m, place in columns]
    rows = [[ways, *values] for (ways, _), *values in zip(found, *shown, strict=True)]
    rows.sort(key=lambda row: -float(row[2]))
    return "\n".join([grid(["cut", *heads], rows), "", *correlations(sides), ""])


def correlations(sides: Sides) -> Iterator[str]:
    """A line for each measure and each way of counting."""
    for words, alike in (("both models", all), ("either model", any)):
        found = merged(sides, alike)
        for measure in MEASURES:
            told = rank_correlation(*(measured(found, place, measure) for place in (0, 1)))
            interval = f"{told.estimate:+.2f} ({told.low:+.2f} to {told.high:+.2f})"
            yield f"- {measure}: rho {interval}, {len(found)} cuts, those that are one on {words} once"


if __name__ == "__main__":
    first, of_first, second, of_second = sys.argv[1:]
    for pair in zip(of_first.split(","), of_second.split(","), strict=True):
        print(compare((first, second), (int(pair[0]), int(pair[1]))))
