"""Whether cuts rank alike on two models: `python docs/results/transfer.py cuts_embedded 2,4 cuts_real 5,10`.

Each NAME is a folder of docs/results/data with untrained runs, and its numbers are counts of removed blocks, which
are compared in their order. For each pair of counts a table of what every cut leaves of both models, and Spearman's
correlation over cuts. Metrics that choose the same blocks on either model count once, by their mean, and so do all
random draws.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
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


def merged(sides: list[dict[str, list[Run]]]) -> Iterator[tuple[str, list[list[Run]]]]:
    """The ways of cutting that both models saw, those together that chose the same blocks on either."""
    groups: list[list[str]] = []
    for way in sorted(set(sides[0]) & set(sides[1])):
        joined = [group for group in groups if any(_is_one_cut(sides, way, other) for other in group)]
        groups = [group for group in groups if group not in joined] + [[*sum(joined, []), way]]
    for ways in groups:
        yield ", ".join(ways), [[run for way in ways for run in side[way]] for side in sides]


def _is_one_cut(sides: list[dict[str, list[Run]]], way: str, other: str) -> bool:
    return any([run["cut"] for run in side[way]] == [run["cut"] for run in side[other]] for side in sides)


def compare(names: tuple[str, str], counts: tuple[int, int]) -> str:
    """Markdown: a table of both models, and how far the order of one is that of the other."""
    found = list(merged([by_way(name, removed) for name, removed in zip(names, counts, strict=True)]))
    columns = {
        (measure, place): [mean(map(of, both[place])) for _, both in found]
        for measure, (of, _) in MEASURES.items()
        for place in (0, 1)
    }
    heads = [f"{measure}, {counts[place]} removed of {names[place]}" for measure, place in columns]
    shown = [[format(v, MEASURES[measure][1]) for v in values] for (measure, _), values in columns.items()]
    rows = [[ways, *values] for (ways, _), *values in zip(found, *shown, strict=True)]
    rows.sort(key=lambda row: -float(row[2]))
    told = [rank_correlation(columns[measure, 0], columns[measure, 1]) for measure in MEASURES]
    lines = [
        f"{measure}: rho {each.estimate:+.2f} ({each.low:+.2f} to {each.high:+.2f}), {len(found)} cuts"
        for measure, each in zip(MEASURES, told, strict=True)
    ]
    return "\n".join([grid(["cut", *heads], rows), "", *lines, ""])


if __name__ == "__main__":
    first, of_first, second, of_second = sys.argv[1:]
    for pair in zip(of_first.split(","), of_second.split(","), strict=True):
        print(compare((first, second), (int(pair[0]), int(pair[1]))))
