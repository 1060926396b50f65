"""Which examples are seen when: the whole training as a list of optimiser steps, known before it starts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from sddx.errors import UserError
from sddx.records import Batch
from sddx.training.objective import Totals

if TYPE_CHECKING:
    from sddx.data.encode import Encoded

COUNTED = {"examples": "epochs", "tokens": "tokens", "steps": "steps"}  # by budget, the setting that says how many


@dataclass(frozen=True)
class Step:
    """One optimiser step: row indices per micro-batch, and what its terms are divided by."""

    micro_batches: tuple[tuple[int, ...], ...]
    totals: Totals

    @classmethod
    def of(cls, rows: Sequence[Encoded], members: Sequence[int], batch_size: int) -> Step:
        """These examples as one step, in micro-batches of like length."""
        ordered = sorted(members, key=lambda row: len(rows[row].input_ids))
        parts = tuple(tuple(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size))
        labelled = sum(rows[row].supervised for row in members)
        attended = sum(len(rows[row].input_ids) for row in members)
        return cls(parts, Totals(labelled, attended, len(parts)))

    @property
    def examples(self) -> int:
        """How many rows the step trains on."""
        return sum(len(part) for part in self.micro_batches)


def plan(
    rows: Sequence[Encoded],
    seed: int,
    *,
    batch_size: int,
    accumulate: int = 1,
    budget: str = "examples",
    epochs: int = 1,
    tokens: int | None = None,
    steps: int | None = None,
    pool: int = 16,
) -> list[Step]:
    """All optimiser steps of a training, of batch_size * accumulate examples each (the last of an epoch may
    have fewer).

    budget `examples`: `epochs` passes over all rows. `tokens`: as many passes as it takes, up to and
    including the example that brings the supervised tokens to `tokens`. `steps`: exactly `steps` steps.
    The order within an epoch is a function of (seed, epoch); see `order`. Raises UserError for rows without
    anything to train on, ValueError for a budget without its number.
    """
    limit = {"epochs": epochs, "tokens": tokens, "steps": steps}[COUNTED[budget]]
    if not limit:
        raise ValueError(f"a budget of {budget} needs {COUNTED[budget]}")
    if not any(row.supervised for row in rows):
        raise UserError(f"none of the {len(rows)} training rows has a labelled token: nothing to train on")
    planned: list[Step] = []
    seen = 0
    for epoch in count():
        for members in order(rows, seed, epoch, step_size=batch_size * accumulate, pool=pool):
            if budget == "tokens":
                members = _until(rows, members, limit - seen)
            planned.append(Step.of(rows, members, batch_size))
            seen += planned[-1].totals.labelled
            if (budget == "tokens" and seen >= limit) or (budget == "steps" and len(planned) == limit):
                return planned
        if budget == "examples" and epoch + 1 == limit:
            return planned
    raise AssertionError("an endless count ended")


def order(rows: Sequence[Encoded], seed: int, epoch: int, *, step_size: int, pool: int) -> list[list[int]]:
    """The row indices of each step of an epoch: a function of (seed, epoch), however a step is accumulated.

    Rows are shuffled; each `pool` steps' worth is sorted by length and cut into steps, so that little is
    padded; then the steps are shuffled, so that lengths come in no order. `pool=1` does not sort.
    """
    dice = random.Random(f"order of examples, seed {seed}, epoch {epoch}")
    shuffled = list(range(len(rows)))
    dice.shuffle(shuffled)
    steps = []
    for start in range(0, len(shuffled), step_size * pool):
        pooled = shuffled[start : start + step_size * pool]
        if pool > 1:
            pooled.sort(key=lambda row: len(rows[row].input_ids))
        steps += [pooled[i : i + step_size] for i in range(0, len(pooled), step_size)]
    dice.shuffle(steps)
    return steps


class StepLoader:
    """Gives (step, its micro-batches) for every step of the plan, from the position it was restored to.

    Lightning finds `state_dict` and saves the position with each checkpoint (its own default restarts the
    epoch). The whole training is one pass over the plan, so a position is all there is to remember.
    """

    def __init__(self, rows: Sequence[Encoded], steps: Sequence[Step], pad_id: int | None) -> None:
        self.rows, self.steps, self.pad_id, self.position = rows, steps, pad_id, 0

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[Step, list[Batch]]]:
        while self.position < len(self.steps):
            step = self.steps[self.position]
            self.position += 1
            yield step, micro_batches(self.rows, step, self.pad_id)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps that were taken, from which the loader goes on."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the steps of a saved state."""
        self.position = state["position"]


def micro_batches(rows: Sequence[Encoded], step: Step, pad_id: int | None) -> list[Batch]:
    """The tensors of a step, padded, or without a `pad_id` packed."""
    from sddx.data.encode import collate, pack

    parts = [[rows[row] for row in part] for part in step.micro_batches]
    return [pack(part) if pad_id is None else collate(part, pad_id) for part in parts]


def _until(rows: Sequence[Encoded], members: list[int], wanted: int) -> list[int]:
    """The first members, up to and including the one that brings their labelled tokens to `wanted`."""
    for taken, row in enumerate(members, start=1):
        wanted -= rows[row].supervised
        if wanted <= 0:
            return members[:taken]
    return members
