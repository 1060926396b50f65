"""`sddx store [--store FOLDER] ls | why A B | verify | gc`: a look into the store."""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sddx.commands import why
from sddx.config.arguments import exit_status
from sddx.errors import UserError
from sddx.files import lock
from sddx.store import RESUME, default_root, manifest


@exit_status
def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 1 where `verify` found damage, 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    root = Path(options.store or default_root()).expanduser()
    if not root.is_dir() and root != default_root().expanduser():  # which may have nothing in it yet
        raise UserError(f"There is no store at {root}. Give its folder: --store FOLDER.")
    if options.command == "ls":
        return show(root)
    if options.command == "why" and options.b is None:
        return why.of_run(Path(options.a), root if options.store else None)
    if options.command == "why":
        return why.of_keys(root, options.a, options.b)
    if options.command == "verify":
        return verify(root)
    return collect(root, options.older_than, options.dry_run)


def _days(text: str) -> float:
    """A number of days, as argparse takes it."""
    with suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is no number of days. Give 30, for example.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sddx store", description="Look into the store.")
    parser.add_argument("--store", help=f"its folder (default: {default_root()}; of a run, the run's own)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="list the artifacts, oldest first")
    asked = commands.add_parser("why", help="say why a run builds anew, or in what two artifacts differ")
    asked.add_argument("a", help="the folder of a run; or the first characters of a key")
    asked.add_argument("b", nargs="?", help="the first characters of another key")
    commands.add_parser("verify", help="compute all checksums again and list what is damaged")
    gc = commands.add_parser("gc", help="delete what a crash left unusable, what is damaged and what is old")
    gc.add_argument(
        "--older-than",
        type=_days,
        metavar="DAYS",
        help="also what was not used for so long, or stopped so long ago",
    )
    gc.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    return parser


def show(root: Path) -> int:
    """Prints one line for each complete artifact, and why others cannot be read; as plain text, since rich takes
    seconds for 10,000 rows."""
    # no manifest is kept: thousands of them would slow the collector of garbage
    unread: list[str] = []
    rows = sorted(_row(fields) for _, fields in manifest.artifacts(manifest.folders(root), unread))
    width = max((len(stage) for _, stage, *_ in rows), default=5)
    print(f"{'stage':<{width}}  {'key':<12}  {'created (UTC)':<19}  {'seconds':>9}  {'size':>10}")
    for created, stage, key, seconds, count in rows:
        when = created[:19].replace("T", " ")
        print(f"{stage:<{width}}  {key}  {when}  {seconds:>9.1f}  {_bytes(count):>10}")
    print(f"{len(rows)} artifacts, {_bytes(sum(row[-1] for row in rows))} in {root}")
    for reason in unread:
        print(f"left out: {reason}")
    return 0


def _row(fields: dict[str, Any]) -> tuple[str, str, str, float, int]:
    return fields["created"], fields["stage"], fields["key"][:12], fields["seconds"], manifest.size(fields)


def verify(root: Path) -> int:
    """Reads every file of every artifact; prints what is damaged, or cannot be read, and returns 1 where anything
    is."""
    folders = [folder for folder in manifest.folders(root) if folder.suffix != ".partial"]
    damaged = 0
    for folder in folders:
        try:
            wrong = manifest.damage(folder, manifest.read(folder), full=True)
        except UserError as error:
            wrong = [str(error)]
        if wrong:
            damaged += 1
            print(f"damaged: {folder.parents[1].name} {folder.name[:12]}: {'; '.join(wrong)}")
    print(f"{len(folders)} artifacts read, {damaged} damaged")
    return 1 if damaged else 0


def collect(root: Path, older_than: float | None, dry_run: bool) -> int:
    """Deletes partial folders that no process builds, damaged artifacts, and those not used for `older_than`
    days; prints each, and the bytes that this frees. What was stopped and can go on counts as old from then, not as
    partial. What cannot be read at the moment stays, and is named."""
    freed = 0
    for folder in manifest.folders(root):
        try:
            if _reason(folder, older_than):
                freed += _collected(folder, older_than, dry_run)
        except (UserError, OSError) as error:
            print(f"left as it is: {error}")
    print(f"{_bytes(freed)} {'would be ' if dry_run else ''}freed")
    return 0


def _collected(folder: Path, older_than: float | None, dry_run: bool) -> int:
    """Delete one folder; returns its bytes, 0 where another process holds, finished or mended it."""
    key = folder.name.removesuffix(".partial")
    with suppress(lock.Held), lock.hold(folder.with_name(f"{key}.lock"), waiting=lock.refuse):
        if folder.exists() and (reason := _reason(folder, older_than)):  # looked at again under the lock
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            print(f"{folder.parents[1].name} {key[:12]}: {reason}, {_bytes(size)}")
            if not dry_run:
                manifest.remove(folder)
            return size
    return 0


def _reason(folder: Path, older_than: float | None) -> str | None:
    """Why a folder can go; None where it stays. Raises UserError where that cannot be known at the moment."""
    if folder.suffix == ".partial":
        return _reason_of_partial(folder, older_than)
    if manifest.damage(folder, manifest.read(folder)):
        return "damaged"
    days = _days_since(folder / manifest.NAME)
    return f"not used for {days:.0f} days" if older_than is not None and days > older_than else None


def _reason_of_partial(folder: Path, older_than: float | None) -> str | None:
    """The same of what was not finished: the command that was stopped goes on with what it saved to resume."""
    if not (folder / RESUME).is_dir():
        return "unfinished"
    days = _days_since(folder / RESUME)
    return f"stopped {days:.0f} days ago" if older_than is not None and days > older_than else None


def _days_since(path: Path) -> float:
    """Days since it was written."""
    return (time.time() - path.stat().st_mtime) / 86400


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


if __name__ == "__main__":
    sys.exit(main())
