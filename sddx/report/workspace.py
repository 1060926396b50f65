"""The W&B dashboard of a sweep: `python -m sddx.report.workspace --entity me --project sddx`.

Every cell of a sweep is a run whose config says what varied and whose summary holds its recoveries; the panels
draw those. Needs the library wandb-workspaces and a login: pip install 'sddx[workspace]'.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from sddx.config.arguments import exit_status
from sddx.errors import UserError
from sddx.report.curves import AXES, KEPT, MEASURES
from sddx.tracking.loggers import require_login

NAME = re.compile(r"[^/\\#?%:]+")
LOGARITHMIC = ("size", "rank", "learning_rate")


def workspace(entity: str, project: str, tasks: Sequence[str] = ()) -> Any:
    """The dashboard, not yet saved: recovery over every axis, by arm, per task (`tasks` by name), and cost."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as ws

    def over(axis: str, measure: str, title: str) -> Any:
        x, y = panels.Config(axis), panels.SummaryMetric(measure)
        return panels.ScatterPlot(title=title, x=x, y=y, log_x=axis in LOGARITHMIC, running_ymean=True)

    def by_arm(metric: str, title: str) -> Any:
        value = panels.SummaryMetric(metric)
        return panels.BarPlot(title=title, metrics=[value], groupby=panels.Config("loss"), groupby_aggfunc="mean")

    sections = {f"Over {label}": [over(axis, *each) for each in MEASURES.items()] for axis, label in AXES.items()}
    sections["Without training"] = [over("removed", *each) for each in KEPT.items()]
    sections["By arm"] = [by_arm(measure, title) for measure, title in MEASURES.items()]
    sections["Per task"] = [by_arm(f"scores.recovered.{task}", task) for task in tasks]
    seconds = panels.SummaryMetric("seconds.train")
    sections["Cost"] = [
        panels.ScatterPlot(
            title="Recovery over seconds of training", x=seconds, y=panels.SummaryMetric("recovery")
        ),
        by_arm("seconds.train", "Seconds of training"),
        by_arm("peak_memory.train", "Peak memory of training, bytes"),
    ]
    shown = [ws.Section(name=name, panels=drawn, is_open=True) for name, drawn in sections.items() if drawn]
    return ws.Workspace(entity=entity, project=project, name="sddx: recovery", sections=shown)


@exit_status
def main(arguments: list[str] | None = None) -> int:
    """Saves the dashboard and prints its address; returns the exit status, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m sddx.report.workspace", description="Make the W&B dashboard.")
    parser.add_argument("--entity", required=True, help="the W&B user or team")
    parser.add_argument("--project", default="sddx", help="(default: %(default)s)")
    parser.add_argument("--tasks", nargs="*", default=[], help="tasks to draw one by one, such as gsm8k")
    options = parser.parse_args(arguments)
    names = {"--entity": options.entity, "--project": options.project}
    if wrong := [f"{name} {value!r}" for name, value in names.items() if not NAME.fullmatch(value)]:
        raise UserError(f"W&B has no such names: {', '.join(wrong)}. Give those that its address bar shows.")
    require_login()
    try:
        made = workspace(options.entity, options.project, options.tasks)
    except ImportError:
        raise UserError("This needs wandb-workspaces: pip install 'sddx[workspace]'.") from None
    made.save()
    print(made.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
