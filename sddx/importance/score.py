"""Score the units of a model on calibration data: what is measured, and the summary that rules read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sddx.config.build import tried
from sddx.data.encode import by_length
from sddx.errors import UserError
from sddx.importance.uncertainty import quantile
from sddx.models.anatomy import decoder
from sddx.models.outputs import block_states, branch_states
from sddx.records import Batch, Units
from sddx.runtime import Runtime

OfStates = Callable[[Sequence[Tensor], Tensor], Tensor]  # a metric out of one forward pass
SUBSETS = 4  # parts of the calibration data, by which the stability of a ranking is told


@dataclass(frozen=True)
class Subject:
    """What is scored, on what: a frozen model in eval mode, its tokenizer, its units, and batches of labelled
    calibration text."""

    model: Any
    tokenizer: Any
    units: Units
    batches: Sequence[Batch]
    runtime: Runtime

    @property
    def sequences(self) -> int:
        """How many calibration texts there are."""
        return sum(len(batch.input_ids) for batch in self.batches)

    def first(self, sequences: int | None) -> list[Batch]:
        """The first batches, up to so many sequences (None: all)."""
        left, taken = self.sequences if sequences is None else sequences, []
        for batch in self.batches:
            if left > 0:
                taken.append(Batch(batch.input_ids[:left], batch.attention_mask[:left], batch.labels[:left]))
            left -= len(batch.input_ids)
        return taken

    def texts(self, sequences: int | None) -> list[Subject]:
        """The first texts with a label, each as a subject of its own, without padding."""
        subjects = []
        for batch in self.first(sequences):
            for row in range(len(batch.input_ids)):
                kept = batch.attention_mask[row].bool()
                alone = Batch(*(part[row : row + 1, kept] for part in vars(batch).values()))
                if (alone.labels >= 0).any():
                    subjects.append(replace(self, batches=[alone]))
        return subjects


@dataclass(frozen=True)
class Work:
    """What a metric runs, over all texts that it reads: passes of the whole model's `body`, of its `head`, and of
    both forward and backward (`learned`); and evaluations of the whole model on its value's tasks (`models`).
    `alone`: each text by itself, without the padding of a batch."""

    body: float = 0.0
    head: float = 0.0
    learned: float = 0.0
    models: float = 0.0
    alone: bool = False


class Measures(Protocol):
    """A metric that runs the model as it needs to, and says how much that is on so many texts."""

    def measure(self, subject: Subject) -> dict[str, Any]:
        """The summary over the units, as `score_units` gives it."""
        ...

    def work(self, units: Units, texts: int) -> Work:
        """What `measure` runs over so many units and texts."""
        ...


def score_units(subject: Subject, metrics: Mapping[str, OfStates | Measures]) -> dict[str, dict[str, Any]]:
    """The summary of every metric: {"mean", "stderr" and "half_width" of the 95 % interval (None for a single
    sequence), "sequences", "subsets" (the means over parts of the data)}; some add fields of their own.

    Metrics that are functions of states are taken out of one forward pass, all together. Raises UserError
    where there are no sequences, or a score is not finite.
    """
    passing: dict[str, Any] = {name: m for name, m in metrics.items() if not hasattr(m, "measure")}
    summaries = one_pass(subject, passing) if passing else {}
    for name, metric in metrics.items():
        if name not in passing:
            summaries[name] = metric.measure(subject)  # type: ignore[union-attr]
    return {name: summaries[name] for name in metrics}


def works(metrics: Mapping[str, OfStates | Measures], units: Units, texts: int) -> dict[str, Work]:
    """What `score_units` runs on so many texts: by metric, and under "" the one pass of all functions of states. A
    metric that does not say is taken for another pass."""
    by_metric = {"": Work(body=texts)} if any(not hasattr(m, "measure") for m in metrics.values()) else {}
    for name, metric in metrics.items():
        if hasattr(metric, "measure"):
            by_metric[name] = metric.work(units, texts) if hasattr(metric, "work") else Work(body=texts)
    return by_metric


def one_pass(subject: Subject, metrics: Mapping[str, OfStates]) -> dict[str, dict[str, Any]]:
    """The summaries of metrics of states. The head is not run, and nothing is kept but each text's values."""
    body, device = decoder(subject.model), next(subject.model.parameters()).device
    values: dict[str, dict[int, Tensor]] = {name: {} for name in metrics}
    watch = block_states if subject.units.granularity == "blocks" else branch_states
    bar = subject.runtime.progress(total=subject.sequences, what="scoring", unit="text")
    with torch.no_grad(), watch(subject.model) as seen, bar:
        for places, batch in by_length(subject.batches):
            seen.clear()
            mask = batch.attention_mask.to(device)
            body(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
            for name, metric in metrics.items():
                values[name] |= zip(places, _values(metric, seen, mask, subject.units).cpu(), strict=True)
            bar.update(len(mask))
    return {name: _summed(by_place) for name, by_place in values.items()}


def _summed(by_place: Mapping[int, Tensor]) -> dict[str, Any]:
    """The summary of one value per sequence, by its place among the texts."""
    sums = Sums()
    for place in sorted(by_place):
        sums.add(by_place[place][None])
    return sums.summary()


def _values(metric: OfStates, seen: Sequence[Any], mask: Tensor, units: Units) -> Tensor:
    """The metric of every unit and sequence. Units that follow each other without a gap are scored as one chain
    of states; others (one kind of branch, or branches in parallel) each on their own."""
    if units.granularity == "blocks":
        return metric(seen, mask)
    step = {"attention": (0, 2), "feedforward": (1, 2), "sublayers": (0, 1)}[units.granularity]
    pairs = seen[step[0] :: step[1]]
    chained = all(left[1] is right[0] for left, right in zip(pairs, pairs[1:], strict=False))
    if units.granularity == "sublayers" and chained:
        return metric([pairs[0][0], *(after for _, after in pairs)], mask)
    alone = [metric(pair, mask) for pair in pairs]
    return torch.stack([value[:, 0, 1] if value.dim() == 3 else value[:, 0] for value in alone], dim=1)


class Sums:
    """Sums over sequences, in float64: of values, of their squares, and of values in each part of the data."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
        self.parts = [torch.zeros(()).double() for _ in range(SUBSETS)]

    def add(self, values: Tensor) -> None:
        """Take in one value per sequence and unit: [batch, ...]. Raises UserError where one is not finite."""
        values = values.detach().cpu().double()
        if not values.isfinite().all():
            raise UserError(
                "a score is not finite: a calibration sequence has no tokens, or the model overflows in "
                "this dtype. Drop empty sequences, or score in float32 or bfloat16."
            )
        for place, value in enumerate(values, start=self.count):
            self.parts[place % SUBSETS] = self.parts[place % SUBSETS] + value
        self.count += len(values)
        self.total, self.squares = self.total + values.sum(0), self.squares + values.square().sum(0)

    def summary(self) -> dict[str, Any]:
        """Mean, errors and means of the parts. Raises UserError where nothing was taken in."""
        require_sequences("this metric", self.count, 1)
        stderr = half_width = None
        if self.count > 1:
            variance = (self.squares - self.total.square() / self.count).clamp(min=0) / (self.count - 1)
            error = (variance / self.count).sqrt()
            stderr, half_width = error.tolist(), (quantile(self.count) * error).tolist()
        sizes = [len(range(part, self.count, SUBSETS)) for part in range(SUBSETS)]
        parts = [(total / size).tolist() for total, size in zip(self.parts, sizes, strict=True) if size]
        return {
            "mean": (self.total / self.count).tolist(),
            "stderr": stderr,
            "half_width": half_width,
            "sequences": self.count,
            "subsets": parts if len(parts) > 1 else [],
        }


def require_sequences(metric: str, count: int, needed: int) -> None:
    """Raises UserError where there is too little calibration data."""
    if count < needed:
        raise UserError(
            f"{metric} was given {count} calibration sequences and needs {needed} at least, better hundreds. Raise "
            "calibration.size, or choose a larger text."
        )


def require_metric(where: str, metric: OfStates | Measures) -> None:
    """Raises UserError where what stands at the setting `where` cannot be a metric: one that does not `measure` is
    tried on the random states [2, 3, 4] of three blocks, and must give values for both sequences."""
    if hasattr(metric, "measure"):
        return
    states = list(torch.randn(4, 2, 3, 4, generator=torch.Generator().manual_seed(0)))
    value = tried(where, metric, states, torch.ones(2, 3, dtype=torch.long))
    if not isinstance(value, Tensor) or value.shape not in ((2, 3), (2, 4, 4)):
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(
            f"{where} gives {shape} for 2 sequences and 3 blocks, where [2, 3] (a score a block) or [2, 4, 4] "
            "(distances between all states) is needed."
        )
