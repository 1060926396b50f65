"""Where the main job's time goes: `python benchmarks/main_job.py [--against CLONE] [--json FILE] [overrides ...]`.

Runs the job in a fresh store, then again in the same one, each in its own process, and prints the seconds of every
stage with its share of the first run, the time until the first progress, and the second run's time. With
`--against`, a clone of another commit, that one's job runs in turn with ours, so many `--rounds`, and the ratio is
the median over them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from watch import BAR, watched

HERE = Path(__file__).parents[1]
IMPORTS = "import lightning, peft, torch, transformers, wandb, sddx.stages.evaluate.run, sddx.train"


def timed(clone: Path, folder: Path, overrides: list[str]) -> tuple[float, float | None, dict]:
    """Seconds of a clone's job in a folder, seconds until a bar first moved, and the summary that it wrote."""
    os.environ["PYTHONPATH"] = str(clone)
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "sddx.train", f"store={folder / 'store'}", *overrides]
    total, first, printed = watched(command, folder, BAR)
    summary = Path(printed.decode().strip().splitlines()[-1])
    return total, first, json.loads((folder / summary).read_text())


def explained(folder: Path, overrides: list[str]) -> dict[str, float | None]:
    """The seconds of one job, and of what is paid beside its stages."""
    total, first, summary = timed(HERE, folder, overrides)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    imports = time.perf_counter() - start
    again, _, _ = timed(HERE, folder, overrides)
    stages: dict[str, float] = summary["seconds"]
    rest = {"imports and the rest": total - sum(stages.values()), "the whole run": total}
    for name, seconds in (stages | rest).items():
        print(f"{name:<22}{seconds:>9.1f}{seconds / total:>8.1%}")
    print(f"first progress {first or 0:.1f} s; the same command again {again:.1f} s; imports alone {imports:.1f} s")
    beside = {"first_progress": first, "again": again, "imports": imports}
    return {f"{name}_seconds": seconds for name, seconds in (stages | rest | beside).items()}


def against(clone: Path, folder: Path, rounds: int, overrides: list[str]) -> float:
    """How long this job takes over the clone's, in turn, as the median over the rounds."""
    ratios = []
    for number in range(rounds):
        ours, theirs = (
            timed(each, folder / f"{name}{number}", overrides)[0]
            for name, each in (("ours", HERE), ("theirs", clone))
        )
        ratios.append(ours / theirs)
        print(f"{ours:.1f} s here, {theirs:.1f} s at {clone.name}: {ratios[-1]:.2f}", flush=True)
    return median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a clone of this repository at another commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.against:
            clone = asked.against.resolve()
            figures = {"job_over_other": against(clone, folder, asked.rounds, overrides)}
        else:
            figures = explained(folder / "job", overrides)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
