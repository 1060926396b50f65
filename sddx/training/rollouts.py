"""Answers that the student writes itself while it is trained: which rows, how long, and where they are cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sddx.data.selfdata import Sampling
from sddx.data.templates import rewriting_prompt
from sddx.errors import UserError
from sddx.records import Count, Natural, NonNegative, PositiveShare, Share


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The student writes the answers of a `share` of a step's rows anew, before the step (GKD's lambda,
    2306.13649); the others keep theirs.

    They are sampled at `temperature` (0: the likeliest token each time) within `top_k` and `top_p`, `batch_size`
    side by side, and may be `first` tokens long in the first step and `last` in the last one, in between as on a
    line (short to long as in ShortOPD, 2607.13124). One that was cut off there while it said the same `repeats`
    times or more is cut after the first time (0: never). With `rewrite`, a rewriting template or the name of one,
    the teacher reads the prompt with the reference in it, and the student the prompt alone.

    Raises UserError for lengths that shrink, `repeats` of 1, and a template that does not exist.
    """

    share: Share = 1.0
    temperature: NonNegative = 1.0
    top_p: PositiveShare = 1.0
    top_k: Natural = 0
    first: Count = 32
    last: Count = 128
    repeats: Natural = 4
    batch_size: Count = 64
    rewrite: str | None = None

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise UserError(
                f"loss.rollouts.first={self.first} is more than loss.rollouts.last={self.last}, and rollouts grow "
                "from the one to the other. Lower the first, or raise the last."
            )
        if self.repeats == 1:
            raise UserError("loss.rollouts.repeats=1: everything is said once. Use 2 or more, or 0 to cut nothing.")
        if self.rewrite is not None:
            rewriting_prompt(self.rewrite, "", "")

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    def length(self, step: int, steps: int) -> int:
        """The most tokens of a rollout in this step (from 0) of so many."""
        return round(self.first + (self.last - self.first) * step / max(steps - 1, 1))

    def stream(self, seed: int, step: int, row: int) -> random.Random | None:
        """What the student draws an answer to this row in this step from; None where the row keeps its own. A
        function of these numbers, however a step is cut and whoever has the row."""
        dice = random.Random(f"rollout, seed {seed}, step {step}, row {row}")
        return dice if dice.random() < self.share else None

    def kept(self, tokens: Sequence[int]) -> int:
        """How many tokens of an answer that has not ended are kept: all, or where its last ones are one run of
        tokens `repeats` times or more (the last time may be broken off), those up to the end of the first."""
        length = len(tokens)
        for period in range(1, length // self.repeats + 1) if self.repeats else ():
            alike = period
            while alike < length and tokens[-1 - alike] == tokens[-1 - alike + period]:
                alike += 1
            if alike >= self.repeats * period:
                return length - alike + period
        return length
