"""Where the main job's time goes: `python benchmarks/main_job.py [overrides ...]`.

Runs the job in a fresh store, then again in the same one, each in its own process, and prints the seconds of
every stage with its share of the first run, the time until the first progress, and the second run's time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BAR = re.compile(rb"(?:scoring|distilling|training):\s+\d+%")
IMPORTS = "import lightning, peft, torch, transformers, wandb, sddx.stages.evaluate.run, sddx.train"


def timed(command: list[str], folder: Path) -> tuple[float, float | None, dict]:
    """Seconds in all, seconds until a bar first moved, and the summary that the run wrote."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen, first = b"", None
    assert process.stdout is not None
    while chunk := process.stdout.read1(4096):
        seen += chunk
        if first is None and BAR.search(seen):
            first = time.perf_counter() - start
    if process.wait():
        sys.exit(seen.decode())
    summary = Path(seen.decode().strip().splitlines()[-1])
    return time.perf_counter() - start, first, json.loads((folder / summary).read_text())


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "sddx.train", f"store={folder / 'store'}", *sys.argv[1:]]
        total, first, summary = timed(command, folder)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True)
        imports = time.perf_counter() - start
        again, _, _ = timed(command, folder)
    print(f"{'stage':<22}{'seconds':>9}{'share':>8}")
    for stage, seconds in summary["seconds"].items():
        print(f"{stage:<22}{seconds:>9.1f}{seconds / total:>8.1%}")
    rest = total - sum(summary["seconds"].values())
    print(f"{'imports and the rest':<22}{rest:>9.1f}{rest / total:>8.1%}")
    print(f"{'the whole run':<22}{total:>9.1f}")
    print(
        f"first progress after {first:.1f} s; the same command again {again:.1f} s, imports alone {imports:.1f} s"
    )


if __name__ == "__main__":
    main()
