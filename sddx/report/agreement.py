"""How far metrics agree on what matters least, and how stable each is over parts of its calibration data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Shown

from sddx.compression.choose import contiguous, ranked
from sddx.records import Artifact, Units
from sddx.report import figures
from sddx.report.summary import write
from sddx.report.table import grid

Scores = Mapping[str, Any]  # the summary of one metric in scores.json
Table = dict[str, Any]


def per_unit(values: Sequence[Any]) -> list[float]:
    """One value a unit; of distances between states, those that a single unit spans."""
    if values and isinstance(values[0], list):
        return [row[place + 1] for place, row in enumerate(values[:-1])]
    return [float(value) for value in values]


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one of them ranks nothing."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def stability(scores: Scores) -> float | None:
    """The mean rank correlation between parts of the calibration data, over all pairs of parts."""
    parts = [per_unit(part) for part in scores["subsets"]]
    pairs = [(a, b) for number, a in enumerate(parts) for b in parts[number + 1 :]]
    return mean(correlation(a, b) for a, b in pairs) if pairs else None


def lowest(scores: Scores, remove: int) -> list[int]:
    """The `remove` units of least score, ascending."""
    return sorted(ranked(per_unit(scores["mean"]))[:remove])


def summary_table(scores: Mapping[str, Scores], remove: int, units: Sequence[str]) -> Table:
    """Per metric: the units that matter least, how many of them all other metrics name too, and stability."""
    chosen = {name: lowest(summary, remove) for name, summary in scores.items()}
    rows = []
    for name, summary in scores.items():
        others = [len(set(chosen[name]) & set(chosen[other])) for other in scores if other != name]
        shared = f"{mean(others):.1f} of {remove}" if others and remove else "-"
        stable = stability(summary)
        least = ", ".join(units[unit].removeprefix("block ") for unit in chosen[name])
        known = summary.get("stable")
        sure = "-" if known is None else f"{100 * known:.0f} % after {summary['orders']}"
        rows.append(
            [name, least, shared, "-" if stable is None else f"{stable:.2f}", sure, f"{summary['sequences']:,}"]
        )
    header = ["metric", f"least important {remove}", "shared with others", "stability", "known", "items"]
    return {"header": header, "rows": rows}


def matrix(scores: Mapping[str, Scores]) -> list[list[float]]:
    """Rank correlations between all metrics."""
    values = [per_unit(summary["mean"]) for summary in scores.values()]
    return [[correlation(a, b) for b in values] for a in values]


def correlation_table(scores: Mapping[str, Scores]) -> Table:
    """The same as a table."""
    rows = [[name, *(f"{value:.2f}" for value in row)] for name, row in zip(scores, matrix(scores), strict=True)]
    return {"header": ["rank correlation", *map(str, range(1, len(rows) + 1))], "rows": _numbered(rows)}


def _numbered(rows: list[list[str]]) -> list[list[str]]:
    return [[f"{number} {row[0]}", *row[1:]] for number, row in enumerate(rows, start=1)]


def show_agreement(scored: Artifact, pruning: Mapping[str, Any], folder: Path) -> Path:
    """Print how far the metrics of a score stage agree; write tables and figures into the folder. Returns
    `agreement.md`."""
    scores = json.loads((scored.path / "scores.json").read_text(encoding="utf-8"))
    count = len(per_unit(next(iter(scores.values()))["mean"]))
    granularity = pruning.get("units", "blocks")
    units = Units(granularity, count // 2 if granularity == "sublayers" else count)
    tables = [summary_table(scores, pruning["remove"], units.names), correlation_table(scores)]
    console = Console(width=max(110, Console().width))
    for table in tables:
        shown = Shown(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in table["header"]:
            shown.add_column(column, no_wrap=True)
        for row in table["rows"]:
            shown.add_row(*row)
        console.print(shown)
    write(folder / "scores.json", dict(scores))
    write(folder / "agreement.svg", figures.agreement(list(scores), matrix(scores)))
    for name, summary in scores.items():
        if isinstance(summary["mean"][0], list):
            cut = contiguous(dict(summary), count, pruning["remove"])
            write(folder / f"{name}.svg", figures.distances(summary["mean"], [cut] if cut else []))
    write(folder / "agreement.md", "\n\n".join(grid(**table) for table in tables) + "\n")
    return folder / "agreement.md"
