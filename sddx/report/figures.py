"""Figures as SVG text that takes its colours from the page, so that they are read in light and in dark."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from sddx.report.curves import Family, Run, Variant, is_share, losses, removed_label

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
    start = f'<svg role="img" aria-label="{label}" '
    return start + text[text.index("<svg ") + len("<svg ") :].replace(INK, "currentColor")


def curves(family: Family, measure: str, title: str) -> str:
    """One measure over the family's axis, one line an arm, with bands over seeds."""
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
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
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
    return _svg(figure, f"{title} over {family.label}")


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


def quality_against_cost(runs: Sequence[Run]) -> str:
    """Recovery of every run over the seconds that its training (and its self-data) took."""
    figure, axis = _figure(6, 3.6)
    for number, arm in enumerate(losses(runs)):
        colour, _ = _style(number)
        of_arm = [run for run in runs if run["choices"]["loss"] == arm and run["recovery"] is not None]
        seconds = [run["seconds"].get("train", 0) + run["seconds"].get("distill", 0) for run in of_arm]
        axis.plot(seconds, [100 * run["recovery"] for run in of_arm], "o", color=colour, label=arm, ms=5, alpha=0.8)
    axis.set_xlabel("seconds for training and self-data")
    axis.set_ylabel("recovery, %")
    axis.legend(frameon=False, fontsize=10)
    return _svg(figure, "Recovery over seconds of training and self-data")
