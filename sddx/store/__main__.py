"""`python -m sddx.store [--store FOLDER] ls | why A B | verify | gc`: a look into the store."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sddx.arguments import exit_status
from sddx.records import UserError
from sddx.store import default_root, lock, manifest

ABSENT = "(absent)"


@exit_status
def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 1 where `verify` found damage, 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    root = Path(options.store).expanduser()
    if not root.is_dir() and root != default_root().expanduser():  # which may have nothing in it yet
        raise UserError(f"There is no store at {root}. Give its folder: --store FOLDER.")
    if options.command == "ls":
        return show(root)
    if options.command == "why":
        return explain(root, options.a, options.b)
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
    parser = argparse.ArgumentParser(prog="python -m sddx.store", description="Look into the store.")
    parser.add_argument("--store", default=default_root(), help="its folder (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="list the artifacts, oldest first")
    why = commands.add_parser("why", help="say in what the recipes of two artifacts differ")
    why.add_argument("a", help="the first characters of a key")
    why.add_argument("b", help="the first characters of another key")
    commands.add_parser("verify", help="compute all checksums again and list what is damaged")
    gc = commands.add_parser("gc", help="delete what a crash left, what is damaged and what is old")
    gc.add_argument("--older-than", type=_days, metavar="DAYS", help="also what was not used for so long")
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


def explain(root: Path, a: str, b: str) -> int:
    """Prints every setting, source and input in which two artifacts differ, and goes on into their inputs."""
    artifacts = {fields["key"]: fields for _, fields in manifest.artifacts(manifest.folders(root))}
    lines = list(_differences(_only(artifacts, a), _only(artifacts, b), artifacts, ""))
    print("\n".join(lines) or "the recipes are the same")
    return 0


def _only(artifacts: dict[str, dict[str, Any]], prefix: str) -> dict[str, Any]:
    keys = [key for key in artifacts if key.startswith(prefix)]
    if len(keys) != 1:
        found = f"{len(keys)} artifacts have a key" if keys else "no artifact has a key"
        raise UserError(f"{found} that starts with {prefix!r}; `python -m sddx.store ls` lists the keys")
    return artifacts[keys[0]]


def _differences(
    a: dict[str, Any], b: dict[str, Any], artifacts: dict[str, dict[str, Any]], indent: str
) -> Iterator[str]:
    """Lines `what: in a | in b`, those about the inputs' own recipes indented."""
    if a["stage"] != b["stage"]:
        yield f"{indent}stage: {a['stage']} | {b['stage']}"
    for name, left, right in _unequal(_flat(a["spec"]), _flat(b["spec"])):
        yield f"{indent}spec {name}: {left} | {right}"
    for name, left, right in _unequal(a["sources"], b["sources"]):
        yield f"{indent}source {name}: {left[:12]} | {right[:12]}"
    for one, other in zip_longest(a["inputs"], b["inputs"]):
        if one != other:
            yield f"{indent}input: {_input(one)} | {_input(other)}"
            below = [artifacts.get(entry["key"]) for entry in (one, other) if entry]
            if len(below) == 2 and below[0] and below[1]:
                yield from _differences(below[0], below[1], artifacts, indent + "  ")


def _unequal(a: dict[str, str], b: dict[str, str]) -> list[tuple[str, str, str]]:
    """Each name whose entries differ, with both."""
    pairs = [(name, a.get(name, ABSENT), b.get(name, ABSENT)) for name in sorted(a.keys() | b.keys())]
    return [(name, left, right) for name, left, right in pairs if left != right]


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """The leaves of nested settings as JSON, by dotted name."""
    if not isinstance(value, (dict, list)) or (name and not value):
        return {name: json.dumps(value)}
    leaves: dict[str, str] = {}
    entries = value if isinstance(value, dict) else dict(enumerate(value))
    for key, entry in entries.items():
        leaves |= _flat(entry, f"{name}.{key}" if name else str(key))
    return leaves


def _input(entry: dict[str, str] | None) -> str:
    return f"{entry['stage']} {entry['key'][:12]}" if entry else ABSENT


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
    days; prints each, and the bytes that this frees. What cannot be read at the moment stays, and is named."""
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
        return "unfinished"
    if manifest.damage(folder, manifest.read(folder)):
        return "damaged"
    days = (time.time() - (folder / manifest.NAME).stat().st_mtime) / 86400
    return f"not used for {days:.0f} days" if older_than is not None and days > older_than else None


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


if __name__ == "__main__":
    sys.exit(main())
