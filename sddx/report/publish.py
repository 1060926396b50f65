"""What a set of runs found, on disk and in one W&B run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sddx.report import page
from sddx.report.curves import Family, Run, families
from sddx.report.summary import write
from sddx.store.digest import digest
from sddx.tracking import mark, open_run


def of_sweep(folder: Path, settings: dict[str, Any]) -> None:
    """What the cells of a sweep found, as pages in its folder, and as one W&B run beside theirs; `settings` are the
    tracker's. A sweep that is asked for again and found nothing new opens no second one."""
    runs = page.of_folders([folder])
    if not runs:
        return
    found = publish(runs, page.failed([folder]), folder)
    print(f"{found['headline']}\nWhat they found: {folder / 'report.html'}")
    settings = {name: settings.get(name) for name in ("project", "entity", "group", "mode")}
    seen = mark(Path(runs[0]["store"]), settings, [run["artifacts"] for run in runs])
    if settings["mode"] in ("offline", "online") and not seen.exists():
        to_wandb(runs, found, folder, settings)
        seen.touch()


def publish(runs: Sequence[Run], failures: Sequence[tuple[str, str, str]], out: Path) -> dict[str, Any]:
    """Write report.html, report.md and report.csv; returns the contents of the page."""
    found = page.contents(runs, failures)
    out.mkdir(parents=True, exist_ok=True)
    texts = {"html": page.html(found), "md": page.markdown(found), "csv": page.table_of_runs(runs)}
    for name, text in texts.items():
        write(out / f"report.{name}", text)
    return found


def to_wandb(runs: Sequence[Run], found: dict[str, Any], out: Path, settings: dict[str, Any]) -> str:
    """One W&B run with the tables, every point of every curve (as history, so that W&B's own charts draw it, and
    as a line plot), the figures, and the pages as an artifact. Returns its id, which the runs decide.

    `settings` are project, entity, group and mode.
    """
    import wandb

    identity = digest([run["artifacts"] for run in runs])[:16]
    name = f"report-{settings.get('group') or len(runs)}"
    with open_run(**settings, id=identity, name=name, job_type="report", dir=out) as run:
        for family in families(runs):
            _log_curves(run, family)
        figures = [(f"figures/{s.title}/{f.title}", f.svg) for s in found["sections"] for f in s.figures]
        run.log({where: wandb.Html(str(svg)) for where, svg in figures})
        tables = {section.name: section.table for section in found["sections"] if section.table}
        run.log({f"tables/{n}": wandb.Table(columns=t["header"], data=t["rows"]) for n, t in tables.items()})
        pages = wandb.Artifact(f"report-{identity}", type="report")
        for suffix in ("html", "md", "csv"):
            pages.add_file(str(out / f"report.{suffix}"))
        run.log_artifact(pages)
    return identity


def _log_curves(run: Any, family: Family) -> None:
    """Every point of a family's curves with its interval, and for each measure a line plot."""
    from wandb.plot import line_series

    at = f"{family.axis} ({family.fixed})" if family.fixed else family.axis
    run.define_metric(family.axis, hidden=True)
    run.define_metric(f"{at}/*", step_metric=family.axis)
    for measure in family.measures:
        curves = {arm: points for arm in family.arms if (points := family.curve(arm, measure))}
        for arm, point in ((arm, point) for arm, points in curves.items() for point in points):
            values = {"": point.interval.estimate, "/low": point.interval.low, "/high": point.interval.high}
            run.log({family.axis: point.x} | {f"{at}/{measure}/{arm}{end}": y for end, y in values.items()})
        if curves:
            xs = [[point.x for point in points] for points in curves.values()]
            ys = [[point.interval.estimate for point in points] for points in curves.values()]
            plot = line_series(xs, ys, list(curves), f"{measure} over {at}", family.axis)
            run.log({f"plots/{at}/{measure}": plot})
