"""Rows on disk: JSON lines, in shards cut at fixed row numbers.

Rows stand in one seeded order, so the full shards of a smaller set are, byte for byte, the first shards of a
larger one, and only a partial last shard differs: 2,000 rows are seven full shards and one of 208, and 8,000
rows share the seven. Distilling 8,000 after 2,000 therefore writes 6,208 answers anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from sddx.files.lines import lines
from sddx.records import Example

SHARD_ROWS = 256

Record = TypeVar("Record")


def cut(rows: Sequence[Record]) -> list[Sequence[Record]]:
    """The rows in shards of 256, the last one with what is left."""
    return [rows[at : at + SHARD_ROWS] for at in range(0, len(rows), SHARD_ROWS)]


def write_rows(rows: Iterable[Any], path: Path) -> None:
    """Write dataclass rows as JSON lines. The file appears complete or not at all."""
    written = [json.dumps(asdict(row), ensure_ascii=False, sort_keys=True) + "\n" for row in rows]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(written), encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def read_rows(record: type[Record], *paths: Path) -> list[Record]:
    """All rows, as `record`, of these files and of the shards in these folders, in order of path and row."""
    rows: list[Record] = []
    for path in paths:
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            rows += [record(**json.loads(line)) for line in lines(file)]
    return rows


def write_shards(examples: Sequence[Example], folder: Path) -> list[Path]:
    """Write examples as `shard-00000.jsonl`, ... into a folder that holds no shards yet; return the paths.

    Raises FileExistsError where the folder has shards: those of a larger set would be read along with the
    new.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.jsonl")):
        raise FileExistsError(f"{folder} already holds shards")
    shards = cut(examples)
    paths = [folder / f"shard-{number:05d}.jsonl" for number in range(len(shards))]
    for shard, path in zip(shards, paths, strict=True):
        write_rows(shard, path)
    return paths


def read_examples(*paths: Path) -> list[Example]:
    """The examples of these shard files or folders, in order."""
    return read_rows(Example, *paths)
