"""Rows and texts as batches on a device, and how surprised a model is by answers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sddx.data import encode
from sddx.data.encode import Encoded, collate, encode_all, padding_id, render, text_batches
from sddx.evaluation.text import held_out
from sddx.models.decoding import Progress
from sddx.records import Batch, Example


@dataclass(frozen=True)
class Reading:
    """How rows and texts are read: rows cut at `max_length` tokens and so many at once; texts, and all else, at the
    model's `context` (None: without end). `progress` is told how many rows a batch had, once it is done with."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    context: int | None
    batch_size: int
    device: str
    progress: Progress = lambda rows: None

    def texts(self, texts: Sequence[str]) -> Iterator[Batch]:
        """Texts in their order; every token but the first is a label."""
        return self._here(text_batches(self.tokenizer, texts, context=self.context))

    def by_length(self, texts: Sequence[str]) -> Iterator[Batch]:
        """The same, those of like length side by side."""
        batches = [*text_batches(self.tokenizer, texts, context=self.context)]
        return self._here(batch for _, batch in encode.by_length(batches))

    def prompts(self, rows: Sequence[Example]) -> Iterator[Batch]:
        """The prompts of rows in the model's form, up to where the answers begin."""
        texts = [render(self.tokenizer, row.prompt) for row in rows]
        size = {"max_length": self.max_length, "batch_size": self.batch_size}
        return self._here(text_batches(self.tokenizer, texts, context=self.context, **size))

    def answered(self, rows: Sequence[Example], *, uncut: bool = False) -> Iterator[Batch]:
        """Rows of like length side by side, the tokens of their answers and the end tokens as labels; cut at the
        context alone where they are to be `uncut`."""
        encoded = sorted(self.encoded(rows, uncut=uncut), key=lambda row: len(row.input_ids))
        spans = (encoded[at : at + self.batch_size] for at in range(0, len(encoded), self.batch_size))
        return self._here(collate(span, padding_id(self.tokenizer)) for span in spans)

    def encoded(self, rows: Sequence[Example], *, uncut: bool = False) -> list[Encoded]:
        """Those rows that have a label left."""
        lengths = [self.context or sys.maxsize, *([] if uncut else [self.max_length])]
        return encode_all(self.tokenizer, rows, max_length=min(lengths))[0]

    def _here(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch.to(self.device)
            self.progress(len(batch.input_ids))


def surprise(model: Any, rows: Sequence[Example], reading: Reading) -> dict[str, float | None]:
    """How unlikely answers are to a model: `nats`, the mean cross-entropy over all their tokens, the end tokens
    among them; and `bits_per_byte`, the sum of that over all tokens, in bits, over the sum of the answers' UTF-8
    bytes, without white space around them, of which end tokens have none. None where no row has a label; bits per
    byte also where a row is cut off."""
    encoded = reading.encoded(rows)
    per_token = held_out(model, reading.answered(rows))["perplexity"]
    nats = None if per_token is None else math.log(per_token)
    longest = min(reading.max_length, reading.context or sys.maxsize)
    whole = len(encoded) == len(rows) and all(len(row.input_ids) < longest for row in encoded)
    size = sum(len(row.response.strip().encode()) for row in rows)
    bits = None if nats is None else nats * sum(row.supervised for row in encoded) / math.log(2)
    return {"nats": nats, "bits_per_byte": bits / size if bits is not None and whole and size else None}
