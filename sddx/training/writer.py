"""What writes a step's rollouts: the student, before each step."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sddx.data.encode import Encoded, collate
from sddx.data.selfdata import continued
from sddx.models.decoding import is_batchable
from sddx.parallel.distributed import share, summed
from sddx.records import Amounts, Batch
from sddx.training.batches import Step
from sddx.training.objective import Totals
from sddx.training.rollouts import Rollouts


@dataclass(frozen=True)
class Tally(Amounts):
    """What was written in a training: rows and tokens, how many rows came to an end token and how many were cut
    because they repeated themselves, and the seconds of writing (of this process)."""

    rows: int = 0
    tokens: int = 0
    ended: int = 0
    repeating: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Rollout:
    """The row with the student's answer, and how that came out."""

    row: Encoded
    tokens: int
    ended: bool
    repeating: bool


class Writer:
    """Called before a step it gives the step as it is trained: with the student's own answers to the rows that it
    writes in this step, and the totals of these.

    A row together with its answer has at most `max_length` tokens, as every row has. What a row is answered is a
    function of the weights and (seed, step, row). Of several processes each writes for the micro-batches that it
    trains on. `tally` sums up what was written, and is to be kept with a checkpoint.
    """

    def __init__(
        self,
        student: Any,
        rollouts: Rollouts,
        rows: Sequence[Encoded],
        seed: int,
        *,
        max_length: int,
        ends: Collection[int],
        pad_id: int,
    ) -> None:
        self.student, self.rollouts, self.rows, self.seed = student, rollouts, rows, seed
        self.max_length, self.ends, self.pad_id = max_length, list(ends), pad_id
        self.tally = Tally()
        # Once, so that a training that is resumed writes in the same way.
        modes = student.training
        self.batchable = is_batchable(student.eval(), max_length)
        student.train(modes)

    def __call__(
        self, step: Step, batches: Sequence[Batch], index: int, steps: int
    ) -> tuple[Step, Sequence[Batch]]:
        """The step number `index` (from 0) of so many, and its micro-batches, those of this process as written."""
        started = time.perf_counter()
        own = share(step.micro_batches)
        mine = sorted({row for _, part, _ in own for row in part})
        written = self._written(mine, index, self.rollouts.length(index, steps))
        rows = {row: written[row].row if row in written else self.rows[row] for row in mine}
        made = list(batches)
        for number, part, _ in own if written else ():
            made[number] = collate([rows[row] for row in part], self.pad_id)
        counted = [row for _, part, weight in own for row in part if weight]
        labelled, attended, *amounts = self._summed(counted, rows, written)
        rows_written, tokens, ended, repeating = amounts
        self.tally += Tally(rows_written, tokens, ended, repeating, time.perf_counter() - started)
        return replace(step, totals=Totals(labelled, attended, step.totals.micro_batches)), made

    @torch.no_grad()
    def _written(self, rows: Sequence[int], index: int, length: int) -> dict[int, _Rollout]:
        """The student's answers to those of these rows that it writes in this step."""
        drawn = {row: self.rollouts.stream(self.seed, index, row) for row in rows}
        streams = {row: stream for row, stream in drawn.items() if stream is not None}
        if not streams:
            return {}
        prompts = [self.rows[row].prompt for row in streams]
        limits = [min(length, self.max_length - len(prompt)) for prompt in prompts]
        self.student.eval()
        answers = continued(
            self.student,
            prompts,
            limits,
            self.rollouts.sampling,
            list(streams.values()),
            batch_size=self.rollouts.batch_size,
            ends=self.ends,
            pad=self.pad_id,
            batchable=self.batchable,
        )
        self.student.train()
        return {row: self._rollout(row, answer) for row, answer in zip(streams, answers, strict=True)}

    def _rollout(self, row: int, answer: Sequence[int]) -> _Rollout:
        ended = answer[-1] in self.ends
        kept = len(answer) if ended else self.rollouts.kept(answer)
        return _Rollout(self.rows[row].answered(answer[:kept]), len(answer), ended, kept < len(answer))

    def _summed(self, counted: Sequence[int], rows: dict[int, Encoded], written: dict[int, _Rollout]) -> list[int]:
        """Over these rows of all processes: labels, tokens attended to, then the first four of `Tally`."""
        new = [written[row] for row in counted if row in written]
        amounts = {
            "labelled": sum(rows[row].supervised for row in counted),
            "attended": sum(len(rows[row].input_ids) for row in counted),
            "rows": len(new),
            "tokens": sum(each.tokens for each in new),
            "ended": sum(each.ended for each in new),
            "repeating": sum(each.repeating for each in new),
        }
        device = next(self.student.parameters()).device
        tensors = {name: torch.tensor(float(amount), device=device) for name, amount in amounts.items()}
        return [round(total.item()) for total in summed(tensors).values()]
