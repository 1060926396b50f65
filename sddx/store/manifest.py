"""The manifests of a store: written last, read often, and checked against the files beside them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sddx.errors import UserError
from sddx.files.shapes import FORMAT, Dead, Form, read_json
from sddx.store.digest import checksum, record

NAME = "manifest.json"
# The name of a folder that holds an artifact or part of one; whatever else lies in a store is not the store's.
KEPT = re.compile(r"[0-9a-f]{64}(\.partial)?")


class Recorded(Form):
    """What is known of a file: see `digest.record`."""

    sha256: str
    size: int
    mtime_ns: int


class InputRecord(Form):
    """An input of a stage."""

    stage: str
    key: str


class Manifest(Form):
    """What every reader of a manifest relies on."""

    stage: str
    key: str
    created: str
    seconds: float
    peak_memory: int
    spec: dict[str, Any]
    inputs: list[InputRecord]
    sources: dict[str, str]
    files: dict[str, Recorded]


def write(folder: Path, fields: dict[str, Any]) -> None:
    """Writes the manifest of a finished folder, with every file's checksum, through to the disk.

    Raises FileExistsError where a stage wrote a file of this name itself.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): record(path) for path in paths}
    with (folder / NAME).open("x", encoding="utf-8") as file:
        json.dump({"format": FORMAT} | fields | {"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete artifact; None where there is none, or one that a crash left. Raises UserError for
    one that cannot be read at the moment, or that another version wrote: that artifact may be sound."""
    try:
        return read_json(folder / NAME, Manifest)
    except Dead:
        return None


def damage(folder: Path, fields: dict[str, Any] | None, *, full: bool = False) -> list[str]:
    """What is wrong with an artifact's files, each in words; empty where they are as they were written.

    Large files with the size and time they were written with are trusted, unless `full`. Raises UserError where a
    file cannot be read at the moment.
    """
    if fields is None:
        return [f"{NAME} is missing or damaged"]
    try:
        return _changed(folder, fields, full)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from None


def _changed(folder: Path, fields: dict[str, Any], full: bool) -> list[str]:
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
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)


def find(root: Path, stage: str, key: str) -> Path | None:
    """The folder of a complete artifact in the store at `root`, whose files are as they were written; None where
    there is no such."""
    for path in root.glob(f"{stage}/*/{key}/{NAME}"):
        with suppress(UserError):
            if not damage(path.parent, read(path.parent)):
                return path.parent
    return None


def size(fields: dict[str, Any]) -> int:
    """Bytes of all files of an artifact."""
    return sum(known["size"] for known in fields["files"].values())


def folders(root: Path) -> Iterator[Path]:
    """Every folder of the store at `root` that holds an artifact or part of one (`.partial`)."""
    for stage in _subfolders(root):
        for settings in _subfolders(stage):
            for folder in _subfolders(settings):
                if KEPT.fullmatch(os.path.basename(folder)):
                    yield Path(folder)


def _subfolders(folder: str | Path) -> list[str]:
    """The paths of the visible folders in a folder, in order; as text, which halves the time of `ls`. None where
    it may not be looked into."""
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted(entry.path for entry in entries if not entry.name.startswith(".") and _is_folder(entry))
    return []


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def remove(folder: Path) -> None:
    """Deletes an artifact, its manifest first: a folder that is left half deleted is never complete."""
    (folder / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def artifacts(folders: Iterable[Path], unread: list[str] | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The complete artifacts among these folders, each with its manifest. Why one cannot be read is added to
    `unread`."""
    for folder in (folder for folder in folders if folder.suffix != ".partial"):
        try:
            if fields := read(folder):
                yield folder, fields
        except UserError as error:
            if unread is not None:
                unread.append(str(error))
