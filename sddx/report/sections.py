"""What the report is made of, and its parts that are more than a table: what cuts were chosen by, and what else but
the arm varied."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sddx.records import Units
from sddx.report import figures
from sddx.report.agreement import correlation_table, matrix, per_unit, summary_table
from sddx.report.curves import VARIANTS, Run, Variant, mean_of, score_of, variant_differences, variants
from sddx.report.subjects import having
from sddx.report.table import ABSENT, percent
from sddx.store.manifest import find

Table = dict[str, Any]  # header: list of str, rows: list of lists of str
STABILITY = "Stability is the mean rank correlation between parts of the calibration data."


@dataclass(frozen=True)
class Figure:
    """A drawing and, where there is one, the table of its numbers."""

    title: str
    svg: Markup
    table: Table | None = None


@dataclass(frozen=True)
class Section:
    """A part of the report. `name` is its anchor on the page and the name of its table in W&B; a folded table is
    shown on the page when it is asked for."""

    name: str
    title: str
    table: Table | None = None
    note: str = ""
    figures: Sequence[Figure] = ()
    folded: bool = False

    @property
    def tables(self) -> dict[str, Table]:
        """The tables that have rows, those behind the figures too, by title."""
        drawn = {f"{self.title}: {figure.title.lower()}": figure.table for figure in self.figures}
        return {
            title: table for title, table in {self.title: self.table, **drawn}.items() if table and table["rows"]
        }


def heat_maps(runs: Sequence[Run]) -> Section:
    """The distances that cuts were chosen from, one figure for each scoring that the store still has."""
    maps: list[Figure] = []
    for key in sorted({run["artifacts"]["score"] for run in runs if "score" in run["artifacts"]}):
        scored = [run for run in runs if run["artifacts"].get("score") == key]
        distances = scores_of(scored[0]).get("mean", [])
        if distances and isinstance(distances[0], list):
            cuts = {removed_units(run) for run in scored}
            svg = Markup(figures.distances(distances, [cut for cut in cuts if cut]))
            maps.append(Figure(f"Distances {len(maps) + 1}", svg))
    return Section("distances", "Block distances", note="Rings mark the cuts that were chosen.", figures=maps)


def scores_of(run: Run) -> dict[str, Any]:
    """What a run's cut was chosen by; empty where the store has it no more."""
    place = find(Path(run["store"]), "score", run["artifacts"]["score"])
    return json.loads((place / "scores.json").read_text(encoding="utf-8")).get("pruning", {}) if place else {}


def removed_units(run: Run) -> tuple[int, ...]:
    """The numbers of the units that a run removed."""
    halves = run.get("no_attention", []), run.get("no_feedforward", [])
    whole = sorted(set(range(run["blocks"])) - set(run["cut"]))
    units = run["choices"].get("units", "blocks")
    if units == "sublayers":
        both = [unit for block in whole for unit in (2 * block, 2 * block + 1)]
        return tuple(sorted([*both, *(2 * b for b in halves[0]), *(2 * b + 1 for b in halves[1])]))
    return tuple({"blocks": whole, "attention": halves[0], "feedforward": halves[1]}[units])


def agreements(runs: Sequence[Run]) -> list[Section]:
    """How far the metrics agree that cuts were chosen by, for each model and kind of unit that several metrics
    scored."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if "score" in run["artifacts"] and run["choices"].get("pruning"):
            units = run["choices"].get("units", "blocks")
            groups.setdefault((run["artifacts"]["model"], units), []).append(run)
    sections = []
    for (_, units), group in groups.items():
        # Some metrics are measured for a number of units to remove: those of the largest cut are compared.
        by_name = {run["choices"]["pruning"]: run for run in sorted(group, key=lambda r: r["choices"]["removed"])}
        scores = {name: kept for name, run in by_name.items() if (kept := scores_of(run))}
        counts = {len(per_unit(kept["mean"])) for kept in scores.values()}
        if len(scores) > 1 and len(counts) == 1:
            count = counts.pop()
            remove = max(run["choices"]["removed"] for run in group)
            names = Units(units, count // 2 if units == "sublayers" else count).names
            svg = Markup(figures.agreement(list(scores), matrix(scores)))
            drawn = Figure("Rank correlations", svg, correlation_table(scores))
            table, title = summary_table(scores, remove, names), f"Agreement of metrics, {units}"
            sections.append(Section(f"agreement {units}", title, table, STABILITY, [drawn]))
    return sections


def variant_sections(runs: Sequence[Run]) -> list[Section]:
    """For each of metric, units and patch that varies: recovery before and after training over how much was
    removed, differences, scores per task before training, and figures."""
    sections = []
    for choice, (label, _, base) in VARIANTS.items():
        if varied := variants(runs, choice):
            name, title = f"by {label}", f"By {label}"
            over = "Recovery before → after training, per cent, means over seeds."
            minus = "In points of the average, on the same items and seeds; 95 %."
            held = _variant_differences(runs, choice, label)
            tasks = _variant_tasks(varied, label)
            sections += [
                Section(name, title, _variant_table(varied, label), over, _variant_figures(varied)),
                Section(f"{name} differences", f"{title}, minus {base}", held, minus),
                Section(
                    f"{name} tasks", f"{title}, scores per task before training", tasks, "Per cent.", folded=True
                ),
            ]
    return sections


def _variant_figures(varied: Sequence[Variant]) -> list[Figure]:
    every = [run for variant in varied for runs in variant.runs.values() for run in runs]
    return [
        Figure(title, Markup(figures.over_removed(varied, measure, title)))
        for measure, title in (("pruned_recovery", "Before training"), ("recovery", "After training"))
        if all(run[measure] is not None for run in every)
    ]


def _variant_table(varied: Sequence[Variant], label: str) -> Table:
    counts = sorted({count for variant in varied for count in variant.runs})
    rows = [
        [variant.where or "all runs", variant.name, *(_before_after(variant.runs.get(n, [])) for n in counts)]
        for variant in varied
    ]
    return {"header": ["runs", label, *(f"{count:g} removed" for count in counts)], "rows": rows}


def _variant_differences(runs: Sequence[Run], choice: str, label: str) -> Table:
    rows = [
        [
            d.where or "all runs",
            d.name,
            f"{d.removed:g}",
            str(d.seeds),
            str(d.draws),
            _shares(d.before),
            _shares(d.after) if d.after else ABSENT,
        ]
        for d in variant_differences(runs, choice)
    ]
    header = ["runs", label, "removed", "seeds", "draws", "before training", "after training"]
    return {"header": header, "rows": rows}


def _shares(interval: Any) -> str:
    """An interval of shares, in points, with what it is over."""
    points = [100 * value for value in (interval.estimate, interval.low, interval.high)]
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*points) + f" over {interval.contains}"


def _variant_tasks(varied: Sequence[Variant], label: str) -> Table:
    """Scores per task of the pruned model before training: whether one choice trades tasks against each other."""
    first = next(iter(varied[0].runs.values()))[0]
    pruned = having(first, "cut") or ""
    tasks = list(first["scores"][pruned])
    rows = [
        [
            variant.where or "all runs",
            variant.name,
            f"{count:g}",
            *(score_of(runs, pruned, task) for task in tasks),
        ]
        for variant in varied
        for count, runs in variant.runs.items()
    ]
    return {"header": ["runs", label, "removed", *tasks], "rows": rows}


def _before_after(runs: Sequence[Run]) -> str:
    if not runs:
        return "-"
    before, after = (percent(mean_of(runs, name)).removesuffix(" %") for name in ("pruned_recovery", "recovery"))
    return before if after == ABSENT else f"{before} → {after}"
