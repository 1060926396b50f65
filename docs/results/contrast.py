"""One arm against another, from runs that were kept: `python docs/results/contrast.py NAME sft sdd` prints the
tables of docs/results/real-model.md and draws the scores into benchmarks/figures, as NAME.svg for these two arms.

NAME is a folder of docs/results/data with one run of each arm for each of several seeds, which pair them. An arm is
a loss, and where answers of several writers were at hand, loss and writer: sft:reference, kd:self. Two intervals of
95 % stand at each difference: over seeds (Student's t), and for other seeds and other items. Scores are in percent
and points.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from tables import DATA, arm, runs

from sddx.report import figures
from sddx.report.table import ABSENT, grid
from sddx.report.tasks import scores
from sddx.statistics.intervals import Interval, crossed_difference, paired_difference, t_interval

FIGURES = Path(__file__).parents[2] / "benchmarks" / "figures"
# What items scored, with its factor and its format.
MEASURES = {
    "scores": ("average, %", 100, ".2f"),
    "bits_per_byte": ("bits per byte, right answers", 1, ".4f"),
    "margin": ("margin, right answers, nats", 1, ".3f"),
}

Run = dict[str, Any]


@cache
def judged(name: str, key: str) -> dict[str, dict[str, list[float]]]:
    """What every item scored in one evaluation, by task."""
    return json.loads((DATA / name / "items" / f"{key[:16]}.json").read_text(encoding="utf-8"))


def paired(name: str, arms: tuple[str, str]) -> dict[int, tuple[Run, Run]]:
    """The runs of two arms by their seed, where both are there. Ends the program where that makes none."""
    found = [[run for run in runs(name) if arm(run) == each] for each in arms]
    first, second = ({run["choices"]["seed"]: run for run in those} for those in found)
    pairs = {seed: (run, second[seed]) for seed, run in first.items() if seed in second}
    same = all(items(name, ours) == items(name, theirs) for ours, theirs in pairs.values())
    if len(pairs) < 2 or len(first) + len(second) < sum(map(len, found)) or not same:
        there = ", ".join(sorted(set(map(arm, runs(name)))))
        sys.exit(
            f"{name} has no such contrast: a run of each arm for several seeds, on the same items. Arms: {there}."
        )
    return pairs


def items(name: str, run: Run) -> dict[str, list[str]]:
    """By task, the items that a run's student was judged by."""
    found = judged(name, run["artifacts"]["evaluate_recovered"])
    return {task: record["hashes"] for task, record in found.items()}


def shown(interval: Interval, factor: float, form: str) -> str:
    low, high, middle = (format(factor * v, f"+{form}") for v in (interval.low, interval.high, interval.estimate))
    return f"{middle} ({low} to {high})"


def by_items(name: str, pairs: Sequence[tuple[Run, Run]], measure: str, tasks: Sequence[str]) -> list[str]:
    """The row of what items scored, over tasks that each count once."""
    _, factor, form = MEASURES[measure]
    sides = [
        [
            {task: judged(name, run["artifacts"]["evaluate_recovered"])[task][measure] for task in tasks}
            for run in side
        ]
        for side in zip(*pairs, strict=True)
    ]
    means = [format(factor * mean(mean(map(mean, run.values())) for run in side), form) for side in sides]
    together = judged(name, pairs[0][0]["artifacts"]["evaluate_recovered"])
    clusters = {task: together[task].get("clusters") for task in tasks}
    differences = [of(sides[1], sides[0], clusters=clusters) for of in (paired_difference, crossed_difference)]
    return [*means, *(shown(each, factor, form) for each in differences)]


def by_runs(pairs: Sequence[tuple[Run, Run]], value: Callable[[Run], float], form: str) -> list[str]:
    """The row of what a run has one number of."""
    sides = [[value(run) for run in side] for side in zip(*pairs, strict=True)]
    differences = t_interval([b - a for a, b in zip(*sides, strict=True)])
    return [*(format(mean(side), form) for side in sides), shown(differences, 1, form), ABSENT]


def named(pairs: Sequence[tuple[Run, Run]]) -> list[str]:
    """The two arms and their difference, as heads of columns."""
    first, second = (arm(run) if ":" in arm(run) else arm(run).upper() for run in pairs[0])
    return [first, second, f"{second} - {first}"]


def table(name: str, pairs: Sequence[tuple[Run, Run]]) -> str:
    """Markdown: the primary measure, the co-primary ones, and each task and what decides nothing after them."""
    tasks, apart = judged(name, pairs[0][0]["artifacts"]["evaluate_recovered"]), pairs[0][0]["apart"]
    counted = [task for task in tasks if task not in apart]
    having = {measure: [task for task in counted if measure in tasks[task]] for measure in MEASURES}
    rows = [[MEASURES[measure][0], *by_items(name, pairs, measure, those)] for measure, those in having.items()]
    rows += [[f"{task}, %", *by_items(name, pairs, "scores", [task])] for task in tasks]
    rows += [["KL to the unpruned model", *by_runs(pairs, lambda run: run["text"]["recovered"]["kl"], ".3f")]]
    rows += [["gap closed, %", *by_runs(pairs, lambda run: 100 * run["gap_closed"], ".1f")]]
    first, second, difference = named(pairs)
    return grid(["measure", first, second, f"{difference}, over seeds", "over seeds and items"], rows)


def of_seeds(pairs: dict[int, tuple[Run, Run]]) -> str:
    """Markdown: the average of each seed's two runs, and what they were trained on."""
    rows = []
    for seed, both in pairs.items():
        averages = [100 * run["scores"]["recovered"]["average"] for run in both]
        tokens = [f"{run['supervised_tokens']:,}" for run in both]
        rows.append([str(seed), *(f"{v:.2f}" for v in averages), f"{averages[1] - averages[0]:+.2f}", *tokens])
    first, second, difference = named(list(pairs.values()))
    return grid(["seed", first, second, difference, f"tokens, {first}", f"tokens, {second}"], rows)


def draw(name: str, pairs: Sequence[tuple[Run, Run]]) -> None:
    """The averages of all models, in ink on white."""
    found = [run for pair in pairs for run in pair]
    chance = found[0]["chance"]
    counted = {task: level for task, level in chance.items() if task not in found[0]["apart"]}
    svg = figures.dots(scores(found, "average"), mean(counted.values()), f"the average of {', '.join(counted)}")
    both = [arm(run).replace(":", "_") for run in pairs[0]]
    file = name if both == ["sft", "sdd"] else "-".join([name, *both])
    (FIGURES / f"{file}.svg").write_text(figures.on_white(svg), encoding="utf-8")


if __name__ == "__main__":
    name, first, second = sys.argv[1:]
    found = paired(name, (first, second))
    print(of_seeds(found), table(name, list(found.values())), sep="\n\n")
    draw(name, list(found.values()))
