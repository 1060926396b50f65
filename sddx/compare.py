"""Two runs side by side: `python -m sddx.compare A B`, with run folders or their `summary.json`.

Prints what differs in the configuration and, per task and on average, the paired difference B - A of what one
model scored, with its interval, McNemar's exact p (Holm over the tasks) and the flipped items; and the same
difference of the measures that likelihoods give (sddx.evaluation.likelihood).
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

from sddx.arguments import exit_status
from sddx.errors import UserError
from sddx.evaluation.likelihood import MEASURES
from sddx.evaluation.statistics import Interval, binary, flips, holm, mcnemar, paired_difference, task_weights
from sddx.run_folder import CONFIG, SAMPLES, read_config, read_samples

Samples = Mapping[str, Mapping[str, Any]]


def run_folder(path: str) -> Path:
    """The run folder that a path means. Raises UserError where it holds no `samples.json`."""
    folder = Path(path).expanduser()
    folder = folder.parent if folder.name == "summary.json" else folder
    if not (folder / SAMPLES).is_file():
        raise UserError(
            f"{path} is no finished run: {folder / SAMPLES} does not exist. "
            "Give the run folder that the last line of sddx.train names, or its summary.json."
        )
    return folder


def load_samples(folder: Path, model: str) -> Samples:
    """Scores, item hashes and settings by task of one model of a run (`samples.json`). Raises UserError."""
    models = read_samples(folder)
    if model not in models:
        raise UserError(f"{folder} has no scores of the {model} model; it has {', '.join(models)}.")
    return models[model]


def check_comparable(first: Samples, second: Samples) -> None:
    """Raise UserError, with every reason, where tasks, settings (template, shots, ...) or items differ."""
    reasons = [f"{task} is in one of the two only" for task in first.keys() ^ second.keys()]
    for task in first.keys() & second.keys():
        other = difference(flat(first[task]["settings"]), flat(second[task]["settings"]))
        reasons += [f"{task}: {name} is {a} and {b}" for name, (a, b) in other.items()]
        a, b = first[task]["hashes"], second[task]["hashes"]
        if a != b:
            shared = len(set(a) & set(b))
            reasons.append(f"{task}: the items differ ({len(a)} and {len(b)}, {shared} in common)")
    if reasons:
        raise UserError(
            "These runs cannot be compared:\n  "
            + "\n  ".join(sorted(reasons))
            + "\nEvaluate both with the same tasks and settings."
        )


def flat(nested: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted name; lists are leaves."""
    if not isinstance(nested, Mapping):
        return {prefix: nested}
    return {
        name: leaf
        for key, value in nested.items()
        for name, leaf in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Names under which two flat mappings differ, with both values (None where a name is missing)."""
    names = dict.fromkeys([*first, *second])
    both = {name: (first.get(name), second.get(name)) for name in names}
    return {name: (a, b) for name, (a, b) in both.items() if a != b}


def compare(first: Samples, second: Samples) -> dict[str, Any]:
    """Paired differences, second - first: {"tasks": {task: {...}}, "average": Interval, "measures": {name: {task or
    "average": Interval}}}.

    A task has `difference` (an Interval over items, or over clusters of items where it has any) and, for binary
    scores only (else None), `flipped` = (right to wrong, wrong to right), `p` and `p_holm`; no p where items are in
    clusters, since the test takes them as independent. Tasks that stand apart are in no average. Raises UserError
    where the two cannot be compared.
    """
    check_comparable(first, second)
    tasks = {task: _task(first[task], second[task]) for task in first}
    tested = [task for task in tasks if tasks[task]["p"] is not None]
    for task, p in zip(tested, holm([tasks[task]["p"] for task in tested]), strict=True):
        tasks[task]["p_holm"] = p
    measures = {name: _measured(first, second, name) for name in MEASURES}
    return {
        "tasks": tasks,
        "average": _average(first, second, "scores", list(first)),
        "measures": {name: found for name, found in measures.items() if found},
    }


def _measured(first: Samples, second: Samples, measure: str) -> dict[str, Interval]:
    """The difference of a measure by task, for tasks that have it in both, and on their average."""
    having = [task for task in first if first[task].get(measure) and second[task].get(measure)]
    found = {task: _difference(first, second, measure, [task]) for task in having}
    return found | ({"average": average} if (average := _average(first, second, measure, having)) else {})


def _average(first: Samples, second: Samples, what: str, tasks: Sequence[str]) -> Interval | None:
    counted = [task for task in tasks if not first[task].get("apart")]
    return _difference(first, second, what, counted) if counted else None


def _difference(first: Samples, second: Samples, what: str, tasks: Sequence[str]) -> Interval:
    before, after = ({task: samples[task][what] for task in tasks} for samples in (first, second))
    weights = task_weights(tasks, {task: first[task]["part_of"] for task in tasks})
    clusters = {task: first[task].get("clusters") for task in tasks}
    return paired_difference([after], [before], weights=weights, clusters=clusters)


def _task(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    before, after = first["scores"], second["scores"]
    judged = binary(before) and binary(after)
    return {
        "difference": _difference({"": first}, {"": second}, "scores", [""]),
        "p": mcnemar(before, after) if judged and not first.get("clusters") else None,
        "p_holm": None,
        "flipped": flips(before, after) if judged else None,
    }


def show(compared: Mapping[str, Any], configuration: Mapping[str, tuple[Any, Any]], console: Console) -> None:
    """Print the configuration's differences and the table of paired differences, in points of percent."""
    settings = Table("setting", "A", "B", title="Configuration", title_justify="left")
    for name, values in configuration.items():
        settings.add_row(name, *(escape(str(value)) for value in values))
    console.print(settings if configuration else "The configurations are the same.")
    table = Table(title="Paired difference B - A in points, 95 % interval over items", title_justify="left")
    for column in ("task", "difference", "interval", "McNemar p", "Holm", "right to wrong", "wrong to right"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, found in compared["tasks"].items():
        tests = [f"{found[name]:.3g}" if found[name] is not None else "-" for name in ("p", "p_holm")]
        table.add_row(task, *_points(found["difference"]), *tests, *map(str, found["flipped"] or ("-", "-")))
    table.add_section()
    if compared["average"]:
        table.add_row("average", *_points(compared["average"]), style="bold")
    console.print(table)
    for measure, found in compared["measures"].items():
        console.print(_measure_table(MEASURES[measure], found))


def _measure_table(title: str, found: Mapping[str, Interval]) -> Table:
    table = Table(title=f"Paired difference B - A, {title}", title_justify="left")
    for column in ("task", "difference", "interval"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, interval in found.items():
        table.add_row(task, f"{interval.estimate:+.4f}", f"{interval.low:+.4f} to {interval.high:+.4f}")
    return table


def _points(interval: Any) -> tuple[str, str]:
    return f"{100 * interval.estimate:+.1f}", f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def _configuration(folder: Path) -> dict[str, Any]:
    return flat(read_config(folder)) if (folder / CONFIG).is_file() else {}


@exit_status
def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two runs. Returns the exit status: 0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m sddx.compare", description="Set two runs side by side.")
    parser.add_argument("first", metavar="A", help="a run's folder, or its summary.json")
    parser.add_argument("second", metavar="B", help="the run that is held against it")
    parser.add_argument("--model", default="recovered", help="which of the judged models (default: %(default)s)")
    given = parser.parse_args(arguments)
    folders = [run_folder(path) for path in (given.first, given.second)]
    compared = compare(*(load_samples(folder, given.model) for folder in folders))
    show(compared, difference(*map(_configuration, folders)), Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
