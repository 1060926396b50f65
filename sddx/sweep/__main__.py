"""`python -m sddx.sweep status [FOLDER]` and `watch`: the cells of a sweep, and what became of each."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from sddx.arguments import exit_status
from sddx.records import UserError
from sddx.sweep import cells
from sddx.sweep.plan import clock

ORDER = ("running", "failed", "killed", "interrupted", "waiting", "done")


@exit_status
def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m sddx.sweep", description="Look at a sweep.")
    parser.add_argument("command", choices=("status", "watch"), help="the table once, or again and again")
    parser.add_argument("folder", nargs="?", help="the sweep's folder (default: the newest under multirun/)")
    parser.add_argument("--every", type=float, default=5, metavar="SECONDS", help="how often watch looks")
    given = parser.parse_args(arguments)
    folder = Path(given.folder) if given.folder else newest(Path("multirun"))
    print(table(folder))
    with suppress(KeyboardInterrupt):
        while given.command == "watch" and any(state in ("running", "waiting") for state, _ in look(folder)):
            time.sleep(given.every)
            print(f"\033[H\033[2J{table(folder)}")
    return 0


def newest(root: Path) -> Path:
    """The sweep under `root` that was changed last. Raises UserError where there is none."""
    found = {record.parent.parent for record in root.glob(f"*/*/*/{cells.RECORD}")}
    if not found:
        raise UserError(f"There is no sweep under {root.absolute()}. Give the folder of one.")
    return max(found, key=lambda folder: folder.stat().st_mtime)


def look(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """State and record of every cell, in their order. Raises UserError where the folder holds none."""
    places = [path.parent for path in folder.glob(f"*/{cells.RECORD}")]
    found = [(cells.state(place), cells.read(place) | {"progress": cells.progress(place)}) for place in places]
    if not found:
        raise UserError(f"{folder} holds no cells of a sweep. Give a folder such as multirun/<date>/<time>.")
    return sorted(found, key=lambda pair: pair[1]["number"])


def table(folder: Path) -> str:
    """The cells as text: number, name, state, time, and the reason of a failure; then the counts."""
    found = look(folder)
    width = max(len(record["name"]) for _, record in found)
    lines = [
        f"{record['number']:>5}  {record['name']:<{width}}  {state:<11}  {_time(state, record):>12}  "
        f"{_where(record) if state == 'running' else _why(record)}"
        for state, record in found
    ]
    counts = Counter(state for state, _ in found)
    total = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
    header = f"{'cell':>5}  {'name':<{width}}  {'state':<11}  {'time':>12}"
    launchers = ", ".join(sorted({record["launcher"] for _, record in found}))
    rows = [line.rstrip() for line in lines]
    return "\n".join([f"{folder} ({launchers})", header, *rows, f"{len(found)} cells: {total}"])


def _time(state: str, record: dict[str, Any]) -> str:
    if state == "running":
        return f"{clock(time.time() - record['started'])} so far"
    return clock(record["seconds"]) if "seconds" in record else ""


def _where(record: dict[str, Any]) -> str:
    """What a running cell does, how far it is, and when it will be through with that."""
    at = record["progress"]
    if not at:
        return ""
    share = f" {at['done'] / at['total']:.0%}" if at["total"] else ""
    left = (at["total"] - at["done"]) / at["rate"] if at["total"] and at["rate"] else None
    return f"{at['what']}{share}" + (f", {clock(left)} left" if left is not None else "")


def _why(record: dict[str, Any]) -> str:
    return (record.get("reason") or " ").splitlines()[0][:80]


if __name__ == "__main__":
    sys.exit(main())
