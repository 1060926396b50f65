"""One step of an adapter on a narrow model: whether a family can learn, before one of its models is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sddx.errors import UserError
from sddx.models.narrow import VOCABULARY, refusals
from sddx.students.trial import small_model
from sddx.training.tuning import coverage

ROWS, TOKENS, RATE = 2, 12, 1e-2


def try_step(config: Any, tuning: Callable[[nn.Module, int], nn.Module], attention: str) -> list[str]:
    """The kinds of weights that a tuning adapts in a narrow model of this config, after one step on random tokens.

    Raises UserError where no such model can be made or adapted, where a gradient is not finite, and where the step
    does not lower the loss."""
    model = small_model(config, attention)
    try:
        student = tuning(model, 0)
        before, after = _losses(student.eval())  # where dropout draws nothing
    except refusals() as error:
        raise UserError(f"a {config.model_type} model cannot be adapted: {error}.") from error
    if not after < before:
        raise UserError(
            f"a step of a {config.model_type} model's adapter does not lower its loss: {before} to {after}."
        )
    return coverage(student)[0]


def _losses(student: nn.Module) -> tuple[float, float]:
    """The loss on random tokens before and after one step."""
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    trained = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=RATE)
    losses = []
    for _ in range(2):
        logits = student(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        # What picks tokens or experts rightly gets none.
        gradients = {name: weight.grad for name, weight in trained.items() if weight.grad is not None}
        if broken := [name for name, gradient in gradients.items() if not gradient.isfinite().all()]:
            raise UserError(f"the gradient of {', '.join(sorted(broken)[:3])} is not finite.")
        optimizer.step()
    return losses[0], losses[1]
