"""How much is computed: FLOPs, steps of decoding, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from sddx.estimate.skeleton import Size
from sddx.estimate.texts import LONGEST, items_of, limited, request
from sddx.records import Amounts

MOST_WRITTEN = 256  # tokens of an answer where nothing else is said; lm-eval's own


@dataclass(frozen=True)
class Effort(Amounts):
    """FLOPs of reading and of learning, steps of decoding, and tokens by kind."""

    reading: float = 0.0
    learning: float = 0.0
    steps: float = 0.0
    read: float = 0.0
    written: float = 0.0
    trained: float = 0.0

    def __mul__(self, times: float) -> Effort:
        return Effort(*(times * amount for amount in astuple(self)))


@dataclass(frozen=True, kw_only=True)
class Judging:
    """Tasks that lm-eval runs over a model, so many requests at once, by the settings of an evaluation: what items,
    after how many examples, of which rows. Tasks that are not known here count nothing."""

    tasks: Sequence[str]
    limit: int | Mapping[str, int] | None = None
    batch_size: int = 32
    shots: int | Mapping[str, int] | None = None
    max_new_tokens: int | None = None
    data_dir: str | None = None
    side: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Judging:
        """By such of these settings as there are among others."""
        return cls(**{each.name: settings[each.name] for each in fields(cls) if each.name in settings})

    @property
    def longest(self) -> float:
        """Tokens of the longest request."""
        return max(request(task, self.shots) for task in self.tasks)

    @property
    def side_by_side(self) -> float:
        """Tokens of as many of these as are asked at once."""
        return self.batch_size * self.longest

    def effort(self, size: Size) -> Effort:
        """lm-eval computes the logits of every token where answers are compared, of the last one of a prompt where
        they are written."""
        return sum((self._of(task, size) for task in self.tasks), Effort())

    def _of(self, task: str, size: Size) -> Effort:
        if (items := items_of(task, self.data_dir)) is None:
            return Effort()
        count, length = limited(self.limit, task, items.count, self.side), request(task, self.shots)
        read, whole = count * items.passes * length, size.body(length) + 2 * size.head
        steps = min(LONGEST * items.written, self.max_new_tokens or MOST_WRITTEN) * -(-count // self.batch_size)
        flops = read * (size.prefill(length) if items.written else whole)
        return Effort(reading=flops, steps=steps, read=read, written=count * items.written)
