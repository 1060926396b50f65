"""How much is computed: FLOPs, steps of decoding, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from sddx.estimate.skeleton import Size
from sddx.estimate.texts import CHARACTERS, LONGEST, Items, items_of, limited, request
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
    after how many examples, of which rows; `packed` where what an item's answers share is read once
    (`sddx.evaluation.likelihoods`). Tasks that are not known here count nothing."""

    tasks: Sequence[str]
    limit: int | Mapping[str, int] | None = None
    batch_size: int = 32
    shots: int | Mapping[str, int] | None = None
    max_new_tokens: int | None = None
    data_dir: str | None = None
    side: str | None = None
    packed: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Judging:
        """By such of these settings as there are among others."""
        return cls(**{each.name: settings[each.name] for each in fields(cls) if each.name in settings})

    def longest(self, *, written: bool) -> float:
        """Mean tokens of a request to the task that asks most, of those whose answers are written or of those whose
        answers are compared; 0 where there is none."""
        known = {task: items for task in self.tasks if (items := items_of(task))}
        asked = [task for task, items in known.items() if bool(items.written) == written]
        return max((request(task, self.shots) for task in asked), default=0)

    @property
    def longest_answer(self) -> int:
        """The most tokens that a written answer may have."""
        return self.max_new_tokens or MOST_WRITTEN

    @property
    def cached(self) -> float:
        """Tokens that a step of decoding attends to, over all answers that are written side by side."""
        return self.batch_size * self.longest(written=True)

    def effort(self, size: Size) -> Effort:
        """All tasks."""
        return sum((self._of(task, size) for task in self.tasks), Effort())

    def _of(self, task: str, size: Size) -> Effort:
        if (items := items_of(task, self.data_dir)) is None:
            return Effort()
        count, length = limited(self.limit, task, items.count, self.side), request(task, self.shots)
        return (self._written if items.written else self._compared)(items, count, length, size)

    def _written(self, items: Items, count: int, length: float, size: Size) -> Effort:
        """Prompts are read up to the logits of their last token; a batch waits for its longest answer."""
        read = count * items.passes * length
        steps = min(LONGEST * items.written, self.longest_answer) * -(-count // self.batch_size)
        return Effort(reading=read * size.prefill(length), steps=steps, read=read, written=count * items.written)

    def _compared(self, items: Items, count: int, length: float, size: Size) -> Effort:
        """Every answer is read behind its question, with the head on all tokens; where they are `packed`, all of an
        item behind one question, with the head on answers alone."""
        answers = items.passes * items.answer / CHARACTERS
        shared = length - items.answer / CHARACTERS
        each = shared + answers if self.packed else items.passes * length
        context, judged = (each, answers) if self.packed else (length, each)
        return Effort(reading=count * (each * size.body(context) + judged * 2 * size.head), read=count * each)
