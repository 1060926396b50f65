"""The manifests of a store: written last, read often, and checked against the files beside them."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sddx.store.digest import checksum, record

NAME = "manifest.json"
FORMAT = 1  # of manifests, and of summaries


def write(folder: Path, fields: dict[str, Any]) -> None:
    """Writes the manifest of a finished folder, with every file's checksum, through to the disk.

    Raises FileExistsError where a stage wrote a file of this name itself.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): record(path) for path in paths}
    with (folder / NAME).open("x") as file:
        json.dump(fields | {"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete artifact; None where there is none or it cannot be read."""
    try:
        fields = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return fields if isinstance(fields, dict) and "files" in fields else None


def damage(folder: Path, fields: dict[str, Any] | None, *, full: bool = False) -> list[str]:
    """What is wrong with an artifact's files, each in words; empty where they are as they were written.

    Large files with the size and time they were written with are trusted, unless `full`.
    """
    if fields is None:
        return [f"{NAME} is missing or cannot be read"]
    wrong = []
    for name, known in fields["files"].items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != known["size"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes, not {known['size']}")
        elif checksum(path, None if full else known) != known["sha256"]:
            wrong.append(f"{name} has other bytes than were written")
    return wrong


def replace_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all, also where several processes or machines write it."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def find(root: Path, stage: str, key: str) -> Path | None:
    """The folder of a complete artifact in the store at `root`; None where it is gone."""
    return next((path.parent for path in root.glob(f"{stage}/*/{key}/{NAME}")), None)


def size(fields: dict[str, Any]) -> int:
    """Bytes of all files of an artifact."""
    return sum(known["size"] for known in fields["files"].values())


def folders(root: Path) -> Iterator[Path]:
    """Every folder of the store at `root` that holds an artifact or part of one (`.partial`)."""
    for stage in _subfolders(root):
        for settings in _subfolders(stage):
            for folder in _subfolders(settings):
                yield Path(folder)


def _subfolders(folder: str | Path) -> list[str]:
    """The paths of the visible folders in a folder, in order; as text, which halves the time of `ls`."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def remove(folder: Path) -> None:
    """Deletes an artifact, its manifest first: a folder that is left half deleted is never complete."""
    (folder / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def artifacts(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every complete artifact of a store, with its manifest."""
    for folder in folders(root):
        if folder.suffix != ".partial" and (fields := read(folder)):
            yield folder, fields
