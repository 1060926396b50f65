"""What a grid costs over its stages: `python benchmarks/sweep.py [--json FILE] [overrides ...]`.

54 cells (3 block counts, 3 sizes, 3 arms, 2 seeds), shrunk: seconds of the sweep against the sum of its distinct
stages, the second run against the first, and against six cells in stores of their own; then how long it takes to
list a store of 10,000 artifacts and to draw the status of 5,000 cells.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sddx.store import manifest
from sddx.sweep import cells

SMALL = (
    "trainer.budget=steps", "trainer.steps=12", "validation=16", "calibration.size=64", "text.size=16",
    "evaluation.limit=24", "wandb.mode=disabled",
)  # fmt: skip
GRID = ("pruning.remove=2,3,4", "dataset.size=256,512,768", "loss=sft,sdd,squarehead", "seed=0,1")


def timed(folder: Path, module: str, *given: str) -> tuple[float, str]:
    """Seconds of a command in its own process, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", module, *given],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout)
    return time.perf_counter() - start, done.stdout


def stages(store: Path) -> float:
    """The seconds that all artifacts of a store took to make."""
    return sum(fields["seconds"] for _, fields in manifest.artifacts(manifest.folders(store)))


def alone(folder: Path, given: list[str]) -> float:
    """Mean seconds of six cells of the grid, each with a store of its own."""
    chosen = [(2, 256, "sft", 0), (3, 512, "sdd", 1), (4, 768, "squarehead", 0)]
    chosen += [(4, 256, "sdd", 0), (2, 512, "squarehead", 1), (3, 768, "sft", 1)]
    spent = []
    for number, (remove, size, loss, seed) in enumerate(chosen):
        cell = [f"pruning.remove={remove}", f"dataset.size={size}", f"loss={loss}", f"seed={seed}"]
        spent.append(timed(folder, "sddx.train", *given, *cell, f"store={folder / f'alone{number}'}")[0])
    return sum(spent) / len(spent)


def large_listings(folder: Path) -> tuple[float, float]:
    """Seconds to list 10,000 artifacts, and to draw the status of 5,000 cells, imports included."""
    fields: dict = {name: {} for name in ("files", "spec", "sources", "versions")} | {"inputs": []}
    fields |= {"format": manifest.FORMAT, "stage": "train", "created": "2026-01-01T00:00:00+00:00"}
    fields |= {"seconds": 1.0, "peak_memory": 1}
    for number in range(10_000):
        key = f"{number:064x}"
        place = folder / "large" / "train" / f"{number:016x}" / key
        place.mkdir(parents=True)
        (place / manifest.NAME).write_text(json.dumps(fields | {"key": key}))
    for number in range(5_000):
        about = {"number": number, "name": f"s{number}", "overrides": [], "launcher": "basic"}
        cells.write(folder / "cells" / str(number), **about, state="done", seconds=1.0)
    listing, _ = timed(folder, "sddx.commands", "store", "--store", str(folder / "large"), "ls")
    status, _ = timed(folder, "sddx.commands", "sweep", "status", str(folder / "cells"))
    return listing, status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = [*SMALL, *overrides]
        sweep = ["--multirun", *given, *GRID, f"store={folder / 'store'}"]
        first, printed = timed(folder, "sddx.train", *sweep)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        sum_of_stages = stages(folder / "store")
        again, _ = timed(folder, "sddx.train", *sweep)
        single = alone(folder, given)
        listing, status = large_listings(folder)
    print(*re.findall(r"^\d+ cells, .*", printed, re.M), sep="\n")
    print(f"the sweep {first:.0f} s, its distinct stages {sum_of_stages:.0f} s: ratio {first / sum_of_stages:.2f}")
    print(f"the same again {again:.1f} s: ratio {again / first:.3f}")
    print(f"a cell alone {single:.1f} s, without the store {54 * single:.0f} s: ratio {first / (54 * single):.2f}")
    print(f"peak memory of the sweep's process {peak:.2f} GiB")
    print(f"10,000 artifacts listed in {listing:.1f} s, 5,000 cells drawn in {status:.1f} s")
    if asked.json:
        figures = {"sweep_over_stages": first / sum_of_stages, "again_over_first": again / first}
        figures |= {"sweep_over_single": first / (54 * single), "sweep_gib": peak}
        figures |= {"list_seconds": listing, "status_seconds": status}
        asked.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
