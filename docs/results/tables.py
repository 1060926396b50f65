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

from sddx.report.curves import is_trained
from sddx.report.table import ABSENT, grid

DATA = Path(__file__).parent / "data"
COLUMNS = ("removed", "cut", "arm", "rate", "seed")


def runs(name: str) -> list[dict[str, Any]]:
    """The kept runs, by blocks removed and then as their choices say."""
    lines = (DATA / name / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted(map(json.loads, lines), key=_place)


def _place(run: dict[str, Any]) -> tuple[int, str, str, float, int]:
    choices = run["choices"]
    return choices["removed"], choices["pruning"], arm(run), choices["learning_rate"], choices["seed"]


def arm(run: dict[str, Any]) -> str:
    """The loss, and where answers of several writers were at hand, whose they are: kd, sft:reference."""
    choices = run["choices"]
    writer = choices.get("dataset.response")
    return f"{choices['loss']}:{writer}" if writer else choices["loss"]


def about(run: dict[str, Any]) -> list[str]:
    choices = run["choices"]
    if not is_trained(run):
        return [str(choices["removed"]), choices["pruning"], "pruned", ABSENT, ABSENT]
    rate = f"{choices['learning_rate']:.0e}".replace("e-0", "e-")
    return [str(choices["removed"]), choices["pruning"], arm(run), rate, str(choices["seed"])]


def scored(run: dict[str, Any], model: str) -> list[str]:
    """A model's scores, and what is less noisy than they are."""
    scores, error = run["scores"][model], run["standard_errors"][model]["average"]
    tasks = [f"{100 * scores[task]:.1f}" for task in scores if task != "average"]
    bits, kl = run["likelihoods"][model]["bits_per_byte"]["average"], run["text"][model]["kl"]
    return [*tasks, f"{100 * scores['average']:.1f} ± {100 * error:.1f}", f"{bits:.3f}", f"{kl:.2f}"]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    tasks = [task for task in found[0]["scores"]["unpruned"] if task != "average"]
    rows = [["0", ABSENT, "unpruned", ABSENT, ABSENT, *scored(found[0], "unpruned")]]
    rows += [[*about(run), *scored(run, "recovered" if is_trained(run) else "pruned")] for run in found]
    return grid([*COLUMNS, *tasks, "average", "bits per byte", "KL"], rows)


if __name__ == "__main__":
    print(table(runs(sys.argv[1])))
