"""How much is computed: FLOPs, steps of decoding, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

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


def judging(
    size: Size,
    tasks: Sequence[str],
    limit: int | Mapping[str, int] | None,
    batch: int,
    shots: int | Mapping[str, int] | None = None,
    longest: int | None = None,
    of: tuple[str | None, str | None] = (None, None),
) -> Effort:
    """Tasks by lm-eval, which computes the logits of every token where answers are compared, of the last one of a
    prompt where they are written. Tasks that are not known here count nothing. `of`: the folder of their
    rows, and the side of their items."""
    total = Effort()
    for task in tasks:
        if (items := items_of(task, of[0])) is not None:
            count, length = limited(limit, task, items.count, of[1]), request(task, shots)
            read, whole = count * items.passes * length, size.body(length) + 2 * size.head
            steps = min(LONGEST * items.written, longest or MOST_WRITTEN) * -(-count // batch)
            flops = read * (size.prefill(length) if items.written else whole)
            total += Effort(reading=flops, steps=steps, read=read, written=count * items.written)
    return total
