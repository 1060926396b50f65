"""Training tried on a narrow model: whether a family can learn, and of packed rows, before one of its models is
there."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from sddx.data.encode import Encoded, collate, pack
from sddx.errors import UserError
from sddx.models.load import said
from sddx.models.narrow import VOCABULARY, refusals
from sddx.models.outputs import run
from sddx.models.varlen import varlen
from sddx.students.trial import small_model
from sddx.training.tuning import coverage

ROWS, TOKENS, RATE = 2, 12, 1e-2
# Rows that are packed, some of them longer than the windows; and what rounding may change, of the largest logit.
LENGTHS, WINDOW, ROUNDING = (7, 1, 12, 12, 4), 5, 1e-4
WINDOWS = ("sliding_window", "attention_chunk_size")


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


def require_packable(config: Any, attention: str) -> None:
    """Raises UserError where texts in one flat row do not have the logits that they have alone, or where that
    cannot be tried on a narrow model of this config.

    Flash attention finds texts as `varlen` does, by the positions that reach it, and is tried as that, on the CPU.
    """
    name, instead = (
        f"trainer.packing=true does not go with a {config.model_type} model",
        "Set trainer.packing=false.",
    )
    if attention not in ("sdpa", "eager") and "flash" not in attention:
        raise UserError(
            f"trainer.packing=true and model.attention={attention}: rows are kept apart by sdpa, eager or flash "
            f"attention. {instead}"
        )
    try:
        model = small_model(_short_sighted(config), "eager" if attention == "eager" else "sdpa")
        leak = _leak(model)
    except UserError as error:
        raise UserError(f"{name}, of which it cannot be tried: {error} {instead}") from error
    except refusals() as error:
        raise UserError(f"{name}, which does not read rows in one: {said(error)}. {instead}") from error
    if not leak < ROUNDING:
        raise UserError(
            f"{name}: one row would see another. With random weights its logits in a pack differ from those that "
            f"it has alone by up to {leak:.2g} of the largest. {instead}"
        )


def _short_sighted(config: Any) -> Any:
    """The config with windows that are shorter than rows."""
    short = deepcopy(config)
    for name in WINDOWS:
        if isinstance(getattr(short, name, None), int):
            setattr(short, name, WINDOW)
    return short


@torch.no_grad()
def _leak(model: nn.Module) -> float:
    """How far logits of packed rows are from those that each row has alone, as a share of the largest."""
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(VOCABULARY, (length,), generator=draw).tolist() for length in LENGTHS]
    rows = [Encoded("", ids, ids, len(ids)) for ids in texts]
    alone = torch.cat([_logits(model, collate([row], 0).inputs) for row in rows])
    with varlen(model):
        packed = _logits(model, pack(rows).inputs)
    return ((packed - alone).abs().max() / alone.abs().max()).item()


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    outputs = run(model, **inputs)
    return outputs.head(outputs.hidden)[0].float()
