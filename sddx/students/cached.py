"""A teacher that is on disk and not in memory: what it said of every answer token, written once and read often."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sddx.errors import UserError
from sddx.records import Batch, Coarse, Outputs
from sddx.store.digest import digest

MANIFEST, IDS, LOGS = "capture.json", "ids.npy", "logs.npy"
WORDS = {
    "model": "the teacher", "tokenizer": "the tokenizer", "template": "the chat template",
    "vocabulary": "the size of the vocabulary", "k": "teacher_cache", "temperature": "the temperature of the loss",
    "max_length": "the tokens of a row at most (max_length)",
}  # fmt: skip


def origin(model: str, tokenizer: Any, **others: Any) -> dict[str, Any]:
    """What a capture is of: the teacher's key, the tokenizer and the chat template of the rows, and `others` of
    WORDS."""
    known = {"tokenizer": tokenizer.get_vocab(), "template": tokenizer.chat_template}
    return {"model": model, **{name: digest(value)[:16] for name, value in known.items()}, **others}


def row_key(input_ids: Sequence[int], labels: Sequence[int]) -> str:
    """What a row is known by, wherever it stands: its tokens and which of them are predicted."""
    return blake2b(np.array([input_ids, labels], np.int64).tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Place:
    """Where a row's answer tokens are: in which files, the first of them and how many."""

    folder: int
    first: int
    count: int


class Writer:
    """The files of a capture, filled row by row in any order: `ids` [tokens, k] and `logs` [tokens, k + 1] as
    `Coarse` has them, those of a row side by side, the rows in their order."""

    def __init__(self, out: Path, counts: Sequence[int], k: int, buckets: int) -> None:
        """`counts`: the answer tokens of every row."""
        self.ends = np.cumsum(counts, dtype=np.int64)
        tokens = int(self.ends[-1]) if len(counts) else 0
        self.counts, shapes = counts, {IDS: (np.int32, k), LOGS: (np.float32, buckets)}
        self.files = [
            np.lib.format.open_memmap(out / name, mode="w+", dtype=dtype, shape=(tokens, width))
            for name, (dtype, width) in shapes.items()
        ]

    def put(self, rows: Iterable[int], coarse: Coarse) -> None:
        """Write what the teacher says of these rows' answer tokens, one row after the other."""
        start = 0
        for row in rows:
            here, there = slice(start, start + self.counts[row]), self._place(row)
            for file, values in zip(self.files, (coarse.ids, coarse.logs), strict=True):
                file[there] = values[here].cpu().numpy()
            start += self.counts[row]

    def _place(self, row: int) -> slice:
        return slice(int(self.ends[row]) - self.counts[row], int(self.ends[row]))


class CachedTeacher:
    """A teacher by what captures in these folders hold of it, memory-mapped; it needs no model. Rows are found by
    their tokens, in whatever order and batches they come, and its "logits" are `Coarse`."""

    def __init__(self, folders: Sequence[Path], asked: Mapping[str, Any]) -> None:
        """Raises UserError where a capture is of something else than is `asked` (`origin`)."""
        self.temperature, self.files, self.places = float(asked["temperature"]), [], dict[str, Place]()
        for number, folder in enumerate(folders):
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            _require_same(folder, manifest["origin"], asked)
            self.files.append([np.load(folder / name, mmap_mode="r") for name in (IDS, LOGS)])
            first = 0
            for key, count in manifest["rows"]:
                self.places[key] = Place(number, first, count)
                first += count

    def require(self, rows: Iterable[Any]) -> None:
        """Raises UserError where one of these encoded rows was not captured."""
        missing = [row.id for row in rows if row_key(row.input_ids, row.labels) not in self.places]
        if missing:
            raise UserError(
                f"{len(missing)} rows, the first of them {missing[0]!r}, are not among those that the teacher was "
                "captured on (teacher_cache). Leave teacher_cache out, and the teacher is run beside the student."
            )

    def __call__(self, batch: Batch, *, states: bool = False) -> Outputs:
        """Its `hidden` [batch, time] numbers the labelled positions, -1 elsewhere, and its `head` makes the coarse
        distributions of such numbers. Raises ValueError for states, which no capture has."""
        if states:
            raise ValueError("a captured teacher has no hidden states")
        device, places = batch.labels.device, [self._place(*row) for row in batch.rows]
        read = [[file[p.first : p.first + p.count] for file in self.files[p.folder]] for p in places]
        ids, logs = (torch.from_numpy(np.concatenate(parts)).to(device) for parts in zip(*read, strict=True))
        labelled = batch.labels != -100
        numbers = torch.full_like(batch.labels, -1)
        numbers[labelled] = torch.arange(len(ids), device=device)

        def head(rows: torch.Tensor) -> Coarse:
            return Coarse(ids[rows].long(), logs[rows], self.temperature)

        return Outputs(numbers, head)

    def _place(self, input_ids: list[int], labels: list[int]) -> Place:
        if place := self.places.get(row_key(input_ids, labels)):
            return place
        raise UserError("a row of this batch is not among those that the teacher was captured on (teacher_cache)")


def _require_same(folder: Path, captured: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    wrong = [
        f"{words} ({captured.get(name)} there, {asked[name]} here)"
        for name, words in WORDS.items()
        if captured.get(name) != asked[name]
    ]
    if wrong:
        raise UserError(
            f"What is captured of a teacher in {folder} does not fit this training: {'; '.join(wrong)}. Remove "
            "that folder and run again, which captures the teacher anew."
        )
