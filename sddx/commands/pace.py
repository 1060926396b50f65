"""The steps that arms take in equal seconds: `sddx pace FOLDER ... --seconds 600`, of short runs of each arm.

A clock is in no key, so seconds become steps before the runs that are compared: a few steps of each arm are timed
on the machine that is to train (any runs below the folders, such as those of a sweep with `trainer.steps=20`), and
printed is the `trainer.steps` with which each takes so long. Lengths of rollouts grow over however many steps there
are, so that the mean step of a short training is that of a long one. What was timed is written as JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from sddx.config import writable_folder
from sddx.config.arguments import duration, exit_status
from sddx.errors import UserError
from sddx.report import page
from sddx.report.curves import Run, arms, is_trained
from sddx.report.summary import write

TIMED_ON = ("device", "threads")


def paces(runs: Sequence[Run], seconds: float) -> list[dict[str, Any]]:
    """By arm, the mean seconds of a step over its seeds, and the steps that fill so many seconds. Raises UserError
    where nothing was trained, and where runs were not timed on one machine."""
    trained = [run for run in runs if is_trained(run) and run.get("training_seconds")]
    if not trained:
        raise UserError("None of these runs says how long its steps took. Train each arm for a few steps first.")
    _require_one_machine(trained)
    return [_pace(where, arm, group, seconds) for where, arm, group in arms(trained)]


def _pace(where: str, arm: str, runs: Sequence[Run], seconds: float) -> dict[str, Any]:
    step = mean(run["training_seconds"] / run["steps"] for run in runs)
    timed = {"runs": [run["artifacts"]["train"] for run in runs], "timed_steps": sum(run["steps"] for run in runs)}
    timed |= {name: runs[0].get(name) for name in TIMED_ON}
    return {"where": where, "arm": arm, **timed, "seconds_a_step": step, "steps": max(round(seconds / step), 1)}


def _require_one_machine(runs: Sequence[Run]) -> None:
    places = {tuple(run.get(name) for name in TIMED_ON) for run in runs}
    if len(places) > 1:
        named = [[each or "unknown" for each in place] for place in sorted(places, key=str)]
        shown = "; ".join(f"{device} with {threads} threads" for device, threads in named)
        raise UserError(
            f"These runs were trained in different places, so that their seconds do not compare: {shown}. Time all "
            "arms on one machine, with as many threads."
        )


def _table(arms: Sequence[dict[str, Any]], seconds: float) -> Table:
    table = Table(title=f"Steps in {seconds:g} s", title_justify="left")
    for column in ("runs", "arm", "timed steps", "seconds a step", "trainer.steps"):
        table.add_column(column, justify="left" if column in ("runs", "arm") else "right")
    for each in arms:
        amounts = str(each["timed_steps"]), f"{each['seconds_a_step']:.3g}", f"{each['steps']:,}"
        table.add_row(each["where"], each["arm"], *amounts)
    return table


@exit_status
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the steps of each arm; returns the exit status, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="sddx pace", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of short runs, or of a sweep of them")
    parser.add_argument("--seconds", type=duration, required=True, help="that the training of each arm is to take")
    parser.add_argument("--out", type=Path, default=Path("."), help="where pace.json goes (default: %(default)s)")
    options = parser.parse_args(arguments)
    runs = page.of_folders(options.folders)
    page.require_runs(runs, ", ".join(map(str, options.folders)))
    arms = paces(runs, options.seconds)
    writable_folder(options.out, "--out")
    write(options.out / "pace.json", {"seconds": options.seconds, "arms": arms})
    Console(width=max(100, Console().width)).print(_table(arms, options.seconds))
    print(f"The same is in {options.out / 'pace.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
