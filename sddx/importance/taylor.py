"""Importance by gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sddx.errors import UserError
from sddx.importance.score import Subject, Sums, Work
from sddx.models.anatomy import blocks, branches
from sddx.models.outputs import run
from sddx.parallel.distributed import whole
from sddx.records import Count, Units


class Taylor:
    """The first-order change of the loss if a unit's weights went to zero: sum over weights of |gradient times
    weight|, averaged over sequences; one backward pass a sequence. `sequences`: how many of the
    calibration texts (null: all)."""

    def __init__(self, *, sequences: Count | None = None) -> None:
        self.sequences = sequences

    def work(self, units: Units, texts: int) -> Work:
        """A forward and a backward pass for each text, apart from the other metrics."""
        return Work(learned=texts if self.sequences is None else min(self.sequences, texts), alone=True)

    def measure(self, subject: Subject) -> dict[str, Any]:
        """The summary over the units. Raises UserError where weights have no gradient, or texts no labels."""
        owned = [unit_weights(subject.model, subject.units, number) for number in range(len(subject.units))]
        weights = {id(w): w for unit in owned for w in unit}
        if not all(w.is_floating_point() for w in weights.values()):
            raise UserError(
                "taylor needs gradients of the weights, and some are not floating-point numbers (a quantised model "
                "has none). Load the model unquantised, or use pruning=angular."
            )
        texts = subject.texts(self.sequences)
        if not texts:
            raise UserError(
                "taylor needs a loss, and the calibration texts have no token after the first. Give longer texts."
            )
        wanted = {name: weight.requires_grad for name, weight in subject.model.named_parameters()}
        try:
            subject.model.requires_grad_(False)
            for weight in weights.values():
                weight.requires_grad_(True)
            return self._sums(subject, texts, owned).summary()
        finally:
            for name, weight in subject.model.named_parameters():
                weight.grad = None
                weight.requires_grad_(wanted[name])

    def _sums(self, subject: Subject, texts: list[Subject], owned: list[list[nn.Parameter]]) -> Sums:
        sums, device = Sums(), next(subject.model.parameters()).device
        with torch.enable_grad():
            for text in subject.runtime.progress(texts, what="taylor", unit="text"):
                batch = text.batches[0].to(device)
                outputs = run(subject.model, batch.input_ids, batch.attention_mask)
                logits = outputs.head(outputs.hidden)[0]
                nn.functional.cross_entropy(logits.float(), batch.labels[0]).backward()
                sums.add(torch.stack([_products(unit) for unit in owned])[None])
                subject.model.zero_grad(set_to_none=True)
        return sums


def unit_weights(model: Any, units: Units, number: int) -> list[nn.Parameter]:
    """The parameters that belong to a unit: a whole block's, or a branch's with its norms."""
    kind, place = units.unit(number)
    block = blocks(model)[place]
    if kind == "blocks":
        return list(block.parameters())
    branch = branches(model)[kind]
    names = filter(None, (branch.core, *branch.others, branch.post))
    return [weight for name in names for weight in getattr(block, name).parameters()]


def _products(weights: list[nn.Parameter]) -> torch.Tensor:
    parts = [(w.grad.float() * w.detach().float()).abs().sum() for w in weights if w.grad is not None]
    return whole(torch.stack(parts).sum()) if parts else torch.zeros(())
