"""`sddx sweep status [FOLDER]` and `watch`: the cells of a sweep, and what became of each."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from sddx.config.arguments import duration, exit_status
from sddx.errors import UserError
from sddx.sweep import cells
from sddx.sweep.plan import clock

ORDER = ("running", "failed", "killed", "interrupted", "waiting", "done")


@exit_status
def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="sddx sweep", description="Look at a sweep.")
    parser.add_argument("command", choices=("status", "watch"), help="the table once, or again and again")
    parser.add_argument("folder", nargs="?", help="the sweep's folder (default: the newest under multirun/)")
    parser.add_argument("--every", type=duration, default=5, metavar="SECONDS", help="how often watch looks")
    options = parser.parse_intermixed_args(arguments)
    folder = Path(options.folder) if options.folder else newest(Path("multirun"))
    print(table(folder))
    with suppress(KeyboardInterrupt):
        while options.command == "watch" and any(
            cell["state"] in ("running", "waiting") for cell in look(folder)[0]
        ):
            time.sleep(options.every)
            print(f"\033[H\033[2J{table(folder)}")
    return 0


def newest(root: Path) -> Path:
    """The sweep under `root` that was changed last. Raises UserError where there is none."""
    records = (record for depth in ("*/*", "*/*/*") for record in root.glob(f"{depth}/{cells.RECORD}"))
    folders = {record.parent.parent for record in records}
    if not folders:
        raise UserError(f"There is no sweep under {root.absolute()}. Give the folder of one.")
    return max(folders, key=lambda folder: folder.stat().st_mtime)


def look(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of all cells, in their order, with the progress of those that run; and why others cannot be read.
    Raises UserError where the folder holds none."""
    records, unread = [], []
    for record in sorted(folder.glob(f"*/{cells.RECORD}")):
        try:
            records.append(cells.look(record.parent) | {"progress": cells.progress(record.parent)})
        except UserError as error:
            unread.append(str(error))
    if not records:
        message = f"{folder} holds no cells of a sweep. Give a folder such as multirun/<date>/<time>."
        raise UserError(*unread or [message])
    return sorted(records, key=lambda cell: cell["number"]), unread


def table(folder: Path) -> str:
    """The cells as text: number, name, state, time, and the reason of a failure; then the counts, and what is left
    out."""
    records, unread = look(folder)
    width = max(len(cell["name"]) for cell in records)
    lines = [
        f"{cell['number']:>5}  {cell['name']:<{width}}  {cell['state']:<11}  {_time(cell):>12}  "
        f"{_where(cell) if cell['state'] == 'running' else _why(cell)}"
        for cell in records
    ]
    counts = Counter(cell["state"] for cell in records)
    total = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
    header = f"{'cell':>5}  {'name':<{width}}  {'state':<11}  {'time':>12}"
    launchers = ", ".join(sorted({cell["launcher"] for cell in records}))
    rows = [line.rstrip() for line in lines]
    left = [f"left out: {reason}" for reason in unread]
    return "\n".join([f"{folder} ({launchers})", header, *rows, f"{len(records)} cells: {total}", *left])


def _time(cell: dict[str, Any]) -> str:
    if cell["state"] == "running":
        return f"{clock(time.time() - cell['started'])} so far" if "started" in cell else ""
    return clock(cell["seconds"]) if "seconds" in cell else ""


def _where(cell: dict[str, Any]) -> str:
    """What a running cell does, how far it is, and when it will be through with that."""
    at = cell["progress"]
    if not at:
        return ""
    share = f" {at['done'] / at['total']:.0%}" if at["total"] else ""
    left = (at["total"] - at["done"]) / at["rate"] if at["total"] and at["rate"] else None
    return f"{at['what']}{share}" + (f", {clock(left)} left" if left is not None else "")


def _why(cell: dict[str, Any]) -> str:
    return (cell.get("reason") or " ").splitlines()[0][:80]


if __name__ == "__main__":
    sys.exit(main())
