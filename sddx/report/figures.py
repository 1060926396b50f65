"""Figures as SVG text that takes its colours from the page, so that they are read in light and in dark."""

from __future__ import annotations

import html
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from sddx.report.contrasts import Difference
from sddx.report.curves import Family, Run, Variant, is_share, losses, removed_label
from sddx.report.subjects import Score
from sddx.statistics.intervals import Interval

# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow that is lost on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
INK = "#010203"  # stands for the page's own text colour


def _style(number: int) -> tuple[str, str]:
    """Colour and line of the nth curve: when the colours are used up, other lines."""
    return COLOURS[number % 6], ("-", "--", ":", "-.")[number // 6 % 4]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {key: INK for key in inked}
    matplotlib.rcParams.update(style | {"svg.fonttype": "none", "svg.hashsalt": "sddx", "font.size": 11})
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _svg(figure: Any, label: str) -> str:
    """The drawing alone, to stand inside a page, with a label for those who cannot see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    start = f'<svg role="img" aria-label="{html.escape(label)}" '
    return start + text[text.index("<svg ") + len("<svg ") :].replace(INK, "currentColor")


def on_white(svg: str) -> str:
    """The same in ink on white, for any page that can show a picture."""
    styled = svg.replace("<svg ", '<svg style="background:#ffffff;font-family:sans-serif" ', 1)
    return styled.replace("currentColor", "#1b1f24")


def curves(family: Family, measure: str, title: str) -> str:
    """One measure over the family's axis, one line an arm, with bands over seeds."""
    return _svg(drawn_curves(family, measure), f"{title} over {family.label}")


def drawn_curves(family: Family, measure: str) -> Any:
    """The same as a figure of matplotlib's."""
    from matplotlib.ticker import LogLocator

    figure, axis = _figure(6, 3.6)
    scale = 100 if is_share(measure) else 1
    for number, arm in enumerate(family.arms):
        points, (colour, line) = family.curve(arm, measure), _style(number)
        xs, ys = [point.x for point in points], [scale * point.interval.estimate for point in points]
        axis.plot(xs, ys, "o", ls=line, color=colour, label=arm, ms=4)
        if any(point.interval.half_width for point in points):
            low, high = ([scale * getattr(p.interval, side) for p in points] for side in ("low", "high"))
            axis.fill_between(xs, low, high, color=colour, alpha=0.18, lw=0)
    if measure == "recovery" and (pruned := family.pruned()):
        xs, ys = [x for x, _ in pruned], [100 * share for _, share in pruned]
        axis.plot(xs, ys, "--", color=COLOURS[-1], label="pruned, untrained", lw=1.2)
    axis.set_xlabel(family.label)
    axis.set_ylabel("%" if is_share(measure) else "perplexity")
    if not is_share(measure):
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.minorticks_off()
    if family.axis in ("size", "learning_rate", "rank"):
        axis.set_xscale("log", base=2)
        ticks = sorted({run["choices"][family.axis] for run in family.runs})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    elif family.axis == "removed":
        counts = sorted({run["choices"]["removed"] for run in family.runs})
        axis.set_xticks(counts[:: len(counts) // 16 + 1])  # more have no room
    axis.legend(frameon=False, fontsize=10)
    return figure


def over_removed(variants: Sequence[Variant], measure: str, title: str) -> str:
    """One measure over how much was removed, one line for each way of removing it."""
    figure, axis = _figure(6, 3.6 + 0.08 * max(len(variants) - 8, 0))
    several = len({variant.where for variant in variants}) > 1
    for number, variant in enumerate(variants):
        heights = [100 * sum(run[measure] for run in runs) / len(runs) for runs in variant.runs.values()]
        label = f"{variant.name}, {variant.where}" if several else variant.name
        colour, line = _style(number)
        axis.plot(list(variant.runs), heights, "o", ls=line, color=colour, label=label, ms=4)
    axis.set_xticks(sorted({count for variant in variants for count in variant.runs}))
    every = [run for variant in variants for runs in variant.runs.values() for run in runs]
    axis.set_xlabel(removed_label(every))
    axis.set_ylabel("recovery, %")
    axis.legend(frameon=False, fontsize=8, ncols=2)
    return _svg(figure, f"Recovery over what was removed: {title}")


def over_share(merges: Sequence[Any], measure: str, title: str) -> str:
    """One measure of merged models over the share of the second student (`sddx.report.merges.Merge`), one line for
    each pair of students; the students stand at the ends, one of the rows of both is a dashed line."""
    figure, axis = _figure(6, 3.6 + 0.25 * len(merges))
    for number, merge in enumerate(merges):
        points, ends, (colour, line) = merge.over_share(measure), merge.ends(measure), _style(number)
        heights = [100 * point.interval.estimate for point in points]
        axis.plot([point.x for point in points], heights, "o", ls=line, color=colour, label=merge.name, ms=4)
        for point in (*points, *ends):
            low, high = 100 * point.interval.low, 100 * point.interval.high
            axis.vlines(point.x, low, high, color=colour, alpha=0.35, lw=1.5)
        at = [100 * point.interval.estimate for point in ends]
        axis.plot([point.x for point in ends], at, "s", color=colour, mfc="none", ms=7)
        if mixed := merge.mixed(measure):
            axis.axhline(100 * mixed.interval.estimate, color=colour, ls="--", lw=1)
    axis.plot([], [], "s", color=INK, mfc="none", ms=7, label="the students")
    if any(merge.mixed(measure) for merge in merges):
        axis.plot([], [], "--", color=INK, lw=1, label="one student of the rows of both")
    axis.set_xlim(-0.03, 1.03)
    axis.set_xlabel("share of the second student, t")
    axis.set_ylabel("%")
    figure.legend(loc="outside upper left", frameon=False, fontsize=9)
    return _svg(figure, f"{title} over the share of the second student")


def distances(mean: Sequence[Sequence[float]], cuts: Sequence[Sequence[int]]) -> str:
    """Angular distance of every run of blocks, by its first block and its size; chosen cuts are ringed."""
    total = len(mean) - 1
    figure, axis = _figure(6, 4.2)
    sizes = range(1, total)
    grid = [[mean[s][s + n] if s + n <= total else float("nan") for s in range(total)] for n in sizes]
    image = axis.imshow(
        grid, origin="lower", aspect="auto", cmap="viridis", extent=(-0.5, total - 0.5, 0.5, total - 0.5)
    )
    figure.colorbar(image, ax=axis, label="angular distance")
    for removed in cuts:
        axis.plot(removed[0], len(removed), "o", mfc="none", mec="white", ms=11, mew=2)
        axis.plot(removed[0], len(removed), "o", mfc="none", mec="#d55e00", ms=13, mew=1.5)
    axis.set_xlabel("first unit of the run")
    axis.set_ylabel("units in the run")
    return _svg(figure, "Angular distance by first block and number of blocks")


def agreement(names: Sequence[str], correlations: Sequence[Sequence[float]]) -> str:
    """Rank correlations between metrics."""
    figure, axis = _figure(6, 5)
    image = axis.imshow(correlations, cmap="RdBu", vmin=-1, vmax=1)
    figure.colorbar(image, ax=axis, label="rank correlation")
    axis.set_yticks(range(len(names)), [f"{number} {name}" for number, name in enumerate(names, start=1)])
    axis.set_xticks(range(len(names)), [str(number) for number in range(1, len(names) + 1)])
    return _svg(figure, "Rank correlations between metrics")


def scattered(points: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> str:
    """Points of several kinds, with lines through the origin of both axes."""
    figure, axis = _figure(5, 3.6)
    for number, (name, of) in enumerate(points.items()):
        axis.plot(*zip(*of, strict=True), "o", color=_style(number)[0], label=name, ms=5, alpha=0.8)
    axis.axhline(0, color=INK, lw=0.5)
    axis.axvline(0, color=INK, lw=0.5)
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.legend(frameon=False, fontsize=10)
    return _svg(figure, f"{up} over {across}")


def quality_against_cost(runs: Sequence[Run]) -> str:
    """Recovery of every run over the seconds that its training (and its self-data) took."""
    figure, axis = _figure(6, 3.6)
    for number, arm in enumerate(losses(runs)):
        colour, _ = _style(number)
        of_arm = [run for run in runs if run["choices"]["loss"] == arm and run["recovery"] is not None]
        seconds = [sum(run["seconds"].get(stage, 0) for stage in ("distill", "select", "train")) for run in of_arm]
        axis.plot(seconds, [100 * run["recovery"] for run in of_arm], "o", color=colour, label=arm, ms=5, alpha=0.8)
    axis.set_xlabel("seconds for training and self-data")
    axis.set_ylabel("recovery, %")
    axis.legend(frameon=False, fontsize=10)
    return _svg(figure, "Recovery over seconds of training and self-data")


def forest(pairs: Sequence[tuple[Difference, Interval]], title: str) -> str:
    """Differences to SFT with their intervals, a row for each, beside the line of no difference. A row whose
    interval is over items, as there is one seed, has a hollow point and a thin line, and says so."""
    rows = [f"{d.arm}, {d.where}" if d.where != "all runs" else d.arm for d, _ in pairs]
    colours = _colours(d.arm for d, _ in pairs)
    figure, axis = _figure(6, 1 + 0.4 * len(rows))
    axis.axvline(0, color=INK, lw=0.8)
    for place, (d, interval) in enumerate(pairs):
        alone = interval.contains == "items"
        style: dict[str, Any] = {"mfc": "none", "elinewidth": 0.8} if alone else {"elinewidth": 1.8}
        reach = [[interval.estimate - interval.low], [interval.high - interval.estimate]]
        axis.errorbar(interval.estimate, place, xerr=reach, fmt="o", ms=5, color=colours[d.arm], **style)
        rows[place] += " (one seed, over items)" if alone else ""
    _rows(axis, range(len(rows)), rows, len(rows) - 1)
    axis.set_xlabel("points minus sft")
    return _svg(figure, f"Paired differences to SFT: {title}")


def dots(scores: Sequence[Score], chance: float | None, title: str) -> str:
    """One task's scores with their standard errors, a row for each model; of several settings, some rows for each,
    with colours for the models."""
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.model if score.role == "reference" else score.where, []).append(score)
    several = len({score.where for score in scores if score.role != "reference"}) > 1
    places = _places(list(groups.values()), gap=several)
    figure, axis = _figure(6, 1.2 + 0.22 * (1 + places[-1][-1]))
    colours = _colours(score.model for score in scores if score.role not in ("reference", "cut"))
    rows = [score for group in groups.values() for score in group]
    heights = [height for group in places for height in group]
    for score, height in zip(rows, heights, strict=True):
        _dot(axis, score, height, colours.get(score.model, INK if score.role == "reference" else COLOURS[-1]))
    if chance is not None:
        axis.axvline(100 * chance, color=INK, ls=":", lw=1, label="chance")
    if several:
        _rows(axis, [mean(group) for group in places], list(groups), heights[-1])
        _legend_above(figure, axis)
    else:
        _rows(axis, heights, [score.model for score in rows], heights[-1])
    axis.set_xlabel("score, %" + (", dotted: chance" if chance is not None and not several else ""))
    return _svg(figure, f"Scores in {title}")


def _colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each arm, SFT's own kept for it, so that arms look alike in all figures of a page."""
    arms = sorted({"sft", *names}, key=lambda arm: (arm != "sft", arm))
    return {arm: _style(number)[0] for number, arm in enumerate(arms)}


def _places(groups: Sequence[Sequence[Any]], *, gap: bool) -> list[list[float]]:
    """The height at which each member of each group stands, with room between groups."""
    places, at = [], 0.0
    for group in groups:
        places.append([at + number for number in range(len(group))])
        at += len(group) + 0.8 * gap
    return places


def _dot(axis: Any, score: Score, place: float, colour: str) -> None:
    """The mean with its error, over the seeds that it is made of."""
    if len(score.seeds) > 1:
        axis.plot(score.seeds, [place] * len(score.seeds), "o", ms=2.5, color=colour, alpha=0.5, mew=0)
    label = None if score.role == "reference" else score.model
    axis.errorbar(mean(score.seeds), place, xerr=score.error, fmt="o", ms=5, color=colour, label=label)


def _rows(axis: Any, places: Sequence[float], labels: Sequence[str], last: float) -> None:
    """Rows from top to bottom, down to the last one, with names at some places."""
    axis.set_ylim(last + 0.7, -0.7)
    axis.set_yticks(places, [textwrap.fill(label, 30) for label in labels], fontsize=9)


def _legend_above(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named, loc="outside upper left", ncols=5, frameon=False, fontsize=9)
