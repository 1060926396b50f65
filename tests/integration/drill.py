"""Kill a sweep at random moments, again and again: `python tests/integration/drill.py [--kills 20]`.

Prints how every kill ended, and at the end whether every cell is done, the store is sound and the numbers are those
of an undisturbed sweep. Takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from composing import numbers, swept  # noqa: E402

from sddx.commands.store import main as store_command  # noqa: E402
from sddx.sweep import cells  # noqa: E402


def start(where: Path, store: str, launcher: str) -> tuple[subprocess.Popen, Path]:
    out = where / f"{time.time():.3f}"
    command = swept(out, where / store, "loss=sft,sdd", f"hydra/launcher={launcher}")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=where, start_new_session=True, **quiet), out


def drill(where: Path, launcher: str, kills: int, dice: random.Random) -> bool:
    """Kills until so many kills have hit a sweep at work; a sweep that got through is compared with the undisturbed
    one, and the next starts with an empty store."""
    process, calm = start(where, "calm", launcher)
    begun = time.monotonic()
    process.wait()
    span, hits, sweeps, right = time.monotonic() - begun, 0, 0, True
    while right and (hits < kills or process.returncode):
        process, out = start(where, f"shaken{sweeps}", launcher)
        try:
            process.wait(dice.uniform(0.2, 0.9) * span if hits < kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            hits += 1
            states = [cells.state(path.parent) for path in sorted(out.glob(f"*/{cells.RECORD}"))]
            print(f"{launcher} kill {hits}: {', '.join(states) or 'before any cell'}", flush=True)
            continue
        same = process.returncode == 0 and numbers(out) == numbers(calm)
        sound = store_command(["--store", str(where / f"shaken{sweeps}"), "verify"]) == 0
        print(f"{launcher}: {len(numbers(out))} cells done, same numbers: {same}, store sound: {sound}", flush=True)
        sweeps, right = sweeps + 1, right and same and sound
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="in all, over both launchers")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        found = []
        for launcher in ("basic", "joblib"):
            (Path(name) / launcher).mkdir()
            found.append(drill(Path(name) / launcher, launcher, given.kills // 2, dice))
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
