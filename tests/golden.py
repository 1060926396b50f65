"""Whether a change of structure moved a number: `python tests/golden.py make FILE` before it, `check FILE` after.

Runs the default job and a small grid in a fresh store, and keeps every number of their summaries and items, the
metrics of training bit for bit, and the report's table of the grid. On one machine, with one number of threads:
floating point is not the same everywhere, which is why no file of it is kept here.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What a run says of itself and of the machine, and which a change of code moves.
OF_THE_RUN = {"artifacts", "device", "model_path", "name", "peak_memory", "seconds", "store", "subjects", "threads",
              "tokens_per_second", "versions"}  # fmt: skip
TIMED = ("seconds", "tokens_per_second", "peak", "memory")
GRID = ["pruning.remove=3,4", "loss=sft,sdd", "dataset.size=128", "trainer.budget=steps", "trainer.steps=6"]


def run(folder: Path, store: Path, *overrides: str, multirun: bool = False) -> None:
    where = f"hydra.sweep.dir={folder}" if multirun else f"hydra.run.dir={folder}"
    asked = ["--multirun"] if multirun else []
    command = [
        sys.executable,
        "-m",
        "sddx.train",
        *asked,
        *overrides,
        where,
        f"store={store}",
        "wandb.mode=disabled",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf by its dotted name."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    return {at: leaf for key, entry in value.items() for at, leaf in flat(entry, f"{name}.{key}").items()}


def numbers(folder: Path) -> dict[str, Any]:
    """Every number of a run that no clock gave."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found = flat({name: value for name, value in summary.items() if name not in OF_THE_RUN}, "summary")
    found |= flat(json.loads((folder / "samples.json").read_text(encoding="utf-8")), "samples")
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if not any(part in cell for cell in row for part in TIMED)]
    return found | {"metrics": sorted(map(",".join, rows))}


def table(file: Path) -> list[list[str]]:
    """The report's table of runs without its columns of time and memory."""
    with file.open(encoding="utf-8", newline="") as opened:
        head, *rows = list(csv.reader(opened))
    kept = [place for place, name in enumerate(head) if not any(part in name for part in (*TIMED, "folder", "run"))]
    return [[row[place] for place in kept] for row in [head, *rows]]


def made() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(folder / "job", folder / "store")
        run(folder / "grid", folder / "store", *GRID, multirun=True)
        cells = sorted(path.parent for path in (folder / "grid").glob("*/summary.json"))
        found = {"job": numbers(folder / "job"), "grid": {cell.name: numbers(cell) for cell in cells}}
        return found | {"report": table(folder / "grid" / "report.csv")}


def main(act: str, file: Path) -> int:
    found = json.loads(json.dumps(made()))
    if act == "make":
        file.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
        return 0
    old, new = (flat(each) for each in (json.loads(file.read_text(encoding="utf-8")), found))
    moved = [name for name, value in sorted(old.items()) if new.get(name) != value]
    for name in moved[:40]:
        print(f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}")
    print(f"{len(old)} numbers, {len(moved)} of them moved, {len(new.keys() - old.keys())} are new")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
