"""What every model scored in each task: the table, and a plot of dots for each task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import mean

from markupsafe import Markup

from sddx.report import figures
from sddx.report.curves import Run, judged, perplexity_of, value_of
from sddx.report.sections import Figure, Section, Table
from sddx.report.subjects import Score, reference, shown_as
from sddx.report.table import ABSENT, marked

NOTE = """Means over seeds, ± the standard error over items (of several seeds, its mean). In the plots a bar is that
error, a small dot a seed, the dotted line what chance gives. * trained on. (apart): in no average."""


def by_model(runs: Sequence[Run], about: Callable[[Sequence[Run], str], list[list[str]]]) -> list[list[str]]:
    """What there is to say `about` every evaluated model: the unpruned one and each pruned one once, and what every
    arm made of that over its seeds, under the arm's name."""
    rows: list[list[str]] = []
    for where, label, role, model, group in _judged(runs):
        new = [[where, label, *row] for row in about(group, model)]
        rows += [row for row in new if not (role in ONCE and row in rows)]
    return rows


ONCE = ("reference", "cut")  # the same whatever arm it was evaluated beside


def _judged(runs: Sequence[Run]) -> Iterator[tuple[str, str, str, str, Sequence[Run]]]:
    """(where, label, role, the model's name in these runs, runs)."""
    for where, arm, role, model, group in judged(runs):
        place = f"model {group[0]['choices'].get('model', '')}" if role == "reference" else where
        label = model if role in ONCE else shown_as(group[0], model, arm)
        yield place, label, role, model, group[:1] if role in ONCE else group


def scores(runs: Sequence[Run], task: str) -> list[Score]:
    """What every evaluated model scored in a task; those that were not evaluated on it are left out."""
    kept: list[Score] = []
    for where, label, role, model, group in _judged(runs):
        score = _score(where, label, role, model, group, task)
        if score.seeds and not (role in ONCE and score in kept):
            kept.append(score)
    return kept


def _score(where: str, label: str, role: str, model: str, runs: Sequence[Run], task: str) -> Score:
    seeds = [100 * run["scores"][model][task] for run in runs if task in run["scores"].get(model, {})]
    errors = [value_of(run, f"standard_errors.{model}.{task}") for run in runs]
    known = [100 * error for error in errors if error is not None]
    return Score(where, label, role, seeds, mean(known) if known else None)


def tasks_of(runs: Sequence[Run]) -> list[str]:
    """Every reported task of these runs, and last their average."""
    tasks = dict.fromkeys(task for run in runs for task in run["scores"][reference(run)] if task != "average")
    return [*tasks, "average"]


def task_table(runs: Sequence[Run]) -> Table:
    """Scores per task with their standard errors, and perplexity on held-out text, of every model."""
    tasks = tasks_of(runs)

    def measured(group: Sequence[Run], model: str) -> list[list[str]]:
        by_task = [_score("", "", "", model, group, task) for task in tasks]
        return [[*(str(score) if score.seeds else ABSENT for score in by_task), perplexity_of(group, model)]]

    trained = {task for run in runs for task in run["trained"]}
    apart = {task for run in runs for task in run.get("apart", ())}
    starred = [marked(task, trained, apart) for task in tasks]
    return {"header": ["runs", "model", *starred, "perplexity"], "rows": by_model(runs, measured)}


def dots(runs: Sequence[Run]) -> list[Figure]:
    """A plot for each task: the unpruned, the pruned and the recovered models, and what chance gives."""
    chance = {task: level for run in runs for task, level in run.get("chance", {}).items()}
    return [
        Figure(name, Markup(figures.dots(scores(runs, task), chance.get(task), name)))
        for task, name in zip(tasks_of(runs), task_table(runs)["header"][2:-1], strict=True)
    ]


def section(runs: Sequence[Run]) -> Section:
    """The table of all tasks and their plots."""
    return Section("tasks", "Scores per task, per cent", task_table(runs), NOTE, dots(runs))
