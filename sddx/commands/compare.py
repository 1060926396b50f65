"""Two runs side by side: `sddx compare A B`, with run folders or their `summary.json`.

Prints what differs in the configuration and, per task and on average, the paired difference B - A of what one
model scored, with its interval, McNemar's exact p (Holm over the tasks) and the flipped items; and the same
difference of the measures that likelihoods give (sddx.evaluation.right_answers).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sddx.config import flatten
from sddx.config.arguments import exit_status
from sddx.errors import UserError
from sddx.evaluation.right_answers import MEASURES
from sddx.report.paired import compare, difference, load_samples
from sddx.run_folder import CONFIG, SAMPLES, folder_of, read_config
from sddx.statistics.intervals import Interval


def run_folder(path: str) -> Path:
    """The run folder that a path means. Raises UserError where it holds no `samples.json`."""
    folder = folder_of(path)
    if not (folder / SAMPLES).is_file():
        raise UserError(
            f"{path} is no finished run: {folder / SAMPLES} does not exist. "
            "Give the run folder that the last line of sddx.train names, or its summary.json."
        )
    return folder


def show(compared: Mapping[str, Any], configuration: Mapping[str, tuple[Any, Any]], console: Console) -> None:
    """Print the configuration's differences and the table of paired differences, in points of percent."""
    settings = Table("setting", "A", "B", title="Configuration", title_justify="left")
    for name, values in configuration.items():
        settings.add_row(name, *(escape(str(value)) for value in values))
    console.print(settings if configuration else "The configurations are the same.")
    table = Table(title="Paired difference B - A in points, 95 % interval over items", title_justify="left")
    for column in ("task", "difference", "interval", "McNemar p", "Holm", "right to wrong", "wrong to right"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, record in compared["tasks"].items():
        tests = [f"{record[name]:.3g}" if record[name] is not None else "-" for name in ("p", "p_holm")]
        table.add_row(task, *_points(record["difference"]), *tests, *map(str, record["flipped"] or ("-", "-")))
    table.add_section()
    if compared["average"]:
        table.add_row("average", *_points(compared["average"]), style="bold")
    console.print(table)
    for measure, intervals in compared["measures"].items():
        console.print(_measure_table(MEASURES[measure], intervals))


def _measure_table(title: str, intervals: Mapping[str, Interval]) -> Table:
    table = Table(title=f"Paired difference B - A, {title}", title_justify="left")
    for column in ("task", "difference", "interval"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, interval in intervals.items():
        table.add_row(task, f"{interval.estimate:+.4f}", f"{interval.low:+.4f} to {interval.high:+.4f}")
    return table


def _points(interval: Any) -> tuple[str, str]:
    return f"{100 * interval.estimate:+.1f}", f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def _configuration(folder: Path) -> dict[str, Any]:
    return flatten(read_config(folder)) if (folder / CONFIG).is_file() else {}


@exit_status
def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two runs. Returns the exit status: 0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="sddx compare", description="Set two runs side by side.")
    parser.add_argument("first", metavar="A", help="a run's folder, or its summary.json")
    parser.add_argument("second", metavar="B", help="the run that is held against it")
    parser.add_argument("--model", default="recovered", help="which of the evaluated models (default: %(default)s)")
    options = parser.parse_args(arguments)
    folders = [run_folder(path) for path in (options.first, options.second)]
    compared = compare(*(load_samples(folder, options.model) for folder in folders))
    show(compared, difference(*map(_configuration, folders)), Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
