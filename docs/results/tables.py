"""The tables of docs/results/real-model.md, from the runs that were kept: `python docs/results/tables.py NAME`.

NAME is a folder of docs/results/data. One row a run: what it removed and how, its choices, the scores in percent of
what was recovered (without training, of what was left), their average with its standard error over items, bits per
byte of right answers, and KL to the unpruned model. First the unpruned model itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
COLUMNS = ("removed", "cut", "arm", "rate", "seed")


def runs(name: str) -> list[dict[str, Any]]:
    """The kept runs, by blocks removed and then as their choices say."""
    lines = (DATA / name / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted(map(json.loads, lines), key=_place)


def _place(run: dict[str, Any]) -> tuple[int, str, str, float, int]:
    choices = run["choices"]
    return choices["removed"], choices["pruning"], choices["loss"], choices["learning_rate"], choices["seed"]


def about(run: dict[str, Any]) -> list[Any]:
    choices, trained = run["choices"], "recovered" in run["scores"]
    rate = f"{choices['learning_rate']:.0e}".replace("e-0", "e-") if trained else "-"
    arm = choices["loss"] if trained else "pruned"
    return [choices["removed"], choices["pruning"], arm, rate, choices["seed"] if trained else "-"]


def scored(run: dict[str, Any], model: str) -> list[str]:
    """A model's scores, and what is less noisy than they are."""
    scores, errors = run["scores"][model], run["standard_errors"][model]
    tasks = [f"{100 * scores[task]:.1f}" for task in scores if task != "average"]
    average = f"{100 * scores['average']:.1f} ± {100 * errors['average']:.1f}"
    return [
        *tasks,
        average,
        f"{run['likelihoods'][model]['bits_per_byte']['average']:.3f}",
        f"{run['text'][model]['kl']:.2f}",
    ]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    tasks = [task.replace("_", "\\_") for task in found[0]["scores"]["unpruned"] if task != "average"]
    rows = [["0", "-", "unpruned", "-", "-", *scored(found[0], "unpruned")]]
    rows += [
        [*map(str, about(run)), *scored(run, "recovered" if "recovered" in run["scores"] else "pruned")]
        for run in found
    ]
    header = [*COLUMNS, *tasks, "average", "bits per byte", "KL"]
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("block_", "block\\_") for cell in line) + " |" for line in lines
    )


if __name__ == "__main__":
    print(table(runs(sys.argv[1])))
