"""What a set of runs found, on disk and in the loggers of their sweep."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sddx.config.build import Node
from sddx.report import figures, page
from sddx.report.curves import Family, Point, Run, families
from sddx.report.summary import write
from sddx.store.digest import digest
from sddx.tracking import Tracked, finished, made, mark


def of_sweep(folder: Path, loggers: Mapping[str, Node], group: str | None) -> None:
    """What the cells of a sweep found, as pages in its folder, and in these loggers as one run beside theirs, whose
    `group` is given. A sweep that is asked for again and found nothing new opens no second one."""
    runs = page.of_folders([folder])
    if not runs:
        return
    contents = publish(runs, page.failed([folder]), folder)
    print(f"{contents['headline']}\nWhat they found: {folder / 'report.html'}")
    store, artifacts = Path(runs[0]["store"]), [run["artifacts"] for run in runs]
    marks = {name: mark(store, "report", node, artifacts) for name, node in loggers.items()}
    seen = {name for name, marked in marks.items() if marked.exists()}
    for name in to_loggers(runs, contents, folder, loggers, group, seen):
        marks[name].touch()


def publish(runs: Sequence[Run], failures: Sequence[tuple[str, str, str]], out: Path) -> dict[str, Any]:
    """Write report.html, report.md and report.csv; returns the contents of the page."""
    contents = page.contents(runs, failures)
    out.mkdir(parents=True, exist_ok=True)
    texts = {"html": page.html(contents), "md": page.markdown(contents), "csv": page.table_of_runs(runs)}
    for name, text in texts.items():
        write(out / f"report.{name}", text)
    return contents


def to_loggers(
    runs: Sequence[Run],
    contents: Mapping[str, Any],
    out: Path,
    loggers: Mapping[str, Node],
    group: str | None = None,
    seen: Collection[str] = (),
) -> list[str]:
    """One run in each logger, whose identity the runs decide: every point of every curve as scalars, so that its
    own charts draw them; and as far as it can show them line plots, the figures, the tables and the pages. Returns
    the names of the loggers that were used, all but those that have `seen` it."""
    identity = digest([run["artifacts"] for run in runs])[:16]
    tracked = Tracked(out, identity, f"report-{group or len(runs)}", "report")
    used = made(loggers, tracked, seen)
    for logger in used.values():
        with finished([logger]):
            for family in families(runs):
                _log_curves(logger, family)
            if hasattr(logger, "pages"):
                _show(logger, contents, out)
    return list(used)


def _show(logger: Any, contents: Mapping[str, Any], out: Path) -> None:
    """What a logger of ours can show beside curves."""
    for section in contents["sections"]:
        for figure in section.figures:
            logger.figure(f"{section.title}/{figure.title}", str(figure.svg))
        if section.table:
            logger.table(section.name, section.table["header"], section.table["rows"])
    logger.pages([out / f"report.{suffix}" for suffix in ("html", "md", "csv")])


def _log_curves(logger: Any, family: Family) -> None:
    """Every point of a family's curves with its interval, and for each measure a line plot."""
    over = f"{family.axis} ({family.fixed})" if family.fixed else family.axis
    shows = hasattr(logger, "plot")
    if shows:
        logger.axis(family.axis, over)
    for measure in family.measures:
        curves = {arm: points for arm in family.arms if (points := family.curve(arm, measure))}
        for x, step, values in _scalars(f"{over}/{measure}", curves):
            logger.log_metrics({family.axis: x, **values}, step=step)
        if curves and shows:
            xys = {arm: [(point.x, point.interval.estimate) for point in points] for arm, points in curves.items()}
            logger.plot(f"{over}/{measure}", family.axis, xys, partial(figures.drawn_curves, family, measure))


def _scalars(name: str, curves: Mapping[str, Sequence[Point]]) -> Iterator[tuple[float, int, dict[str, float]]]:
    """For each point its place on the axis, the same as a step, and its estimate and interval by name. Steps are
    whole numbers: where the axis has others, they count its places."""
    xs = sorted({point.x for points in curves.values() for point in points})
    whole = all(float(x).is_integer() for x in xs)
    for arm, point in ((arm, point) for arm, points in curves.items() for point in points):
        ends = {"": point.interval.estimate, "/low": point.interval.low, "/high": point.interval.high}
        values = {f"{name}/{arm}{end}": value for end, value in ends.items()}
        yield point.x, int(point.x) if whole else xs.index(point.x), values
