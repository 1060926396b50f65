"""Reads the file of an offline W&B run, for which wandb has no reader: a LevelDB log of `wandb.proto` records."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, WHOLE, LAST = 32768, 7, 1, 4


def records(path: Path) -> Iterator[Any]:
    """Every record of the file, put together from its parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + HEADER])
        if at + HEADER + length > len(data):
            return  # not yet written to its end
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(path: Path, patience: float = 30) -> list[dict[str, Any]]:
    """The logged rows of a finished run; its file is written by another process, which ends a little later."""
    until = time.monotonic() + patience
    while not any(record.WhichOneof("record_type") == "exit" for record in records(path)):
        assert time.monotonic() < until, f"{path} has no end"
        time.sleep(0.1)
    rows = [record.history.item for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in row} for row in rows]
