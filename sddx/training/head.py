"""The head, applied to labelled positions only and chunk by chunk: no [batch, time, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sddx.records import Outputs
from sddx.training.objective import Distilled, Supervised

Pieces = Callable[[slice, Tensor], Tensor]  # the terms' sums [terms] over some of the labelled rows


def token_loss(
    terms: Mapping[str, Supervised | Distilled],
    student: Outputs,
    teacher: Outputs | None,
    labels: Tensor,
    *,
    divisor: int,
    chunk: int = 256,
    teacher_labels: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each term summed over the labelled positions (labels [batch, time] not -100) and divided by `divisor`: their
    weighted sum, through which gradients flow, and name -> scalar without gradients. A teacher that read other
    prompts has labels of its own, the same ones in the same order.

    Logits exist for `chunk` rows at a time: their gradients are taken in the same pass, so that neither memory nor
    time grows by what would have to be kept or computed again. The chunk size changes nothing but the order of a
    sum. Without a label the sums are 0, and so are their gradients.
    """
    rows = _labelled(labels)
    teachers = rows if teacher_labels is None or teacher_labels is labels else _labelled(teacher_labels)
    hidden, labels = student.hidden.flatten(0, 1)[rows], labels.flatten()[rows]
    teacher_hidden = None if teacher is None else teacher.hidden.flatten(0, 1)[teachers]

    def sums(here: slice, hidden: Tensor) -> Tensor:
        logits = student.head(hidden)
        teacher_logits = None
        if teacher is not None and teacher_hidden is not None:
            with torch.no_grad():
                teacher_logits = teacher.head(teacher_hidden[here])
        return torch.stack([t.per_token(logits, labels[here], teacher_logits).sum() for t in terms.values()])

    weights = [term.weight for term in terms.values()]
    loss, values = _Chunked.apply(sums, weights, divisor, chunk, hidden, *student.head_weights)
    return loss, dict(zip(terms, values.unbind(), strict=True))


class _Chunked(torch.autograd.Function):
    """Sums over chunks of rows, with the gradients of their weighted sum taken on the way."""

    @staticmethod
    def forward(
        ctx: Any, sums: Pieces, weights: Sequence[float], divisor: int, chunk: int, hidden: Tensor, *head: Tensor
    ) -> tuple[Tensor, Tensor]:
        learns = any(ctx.needs_input_grad)
        pieces, gradients = [], [torch.zeros_like(each) for each in (hidden, *head)] if learns else []
        for start in range(0, max(len(hidden), 1), chunk):
            here = slice(start, start + chunk)
            rows = hidden[here].detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                piece = sums(here, rows)
            pieces.append(piece.detach())
            if learns:
                scale = piece.new_tensor(weights) / divisor
                of_rows, *of_head = torch.autograd.grad(piece, [rows, *head], scale, materialize_grads=True)
                gradients[0][here] = of_rows
                for total, part in zip(gradients[1:], of_head, strict=True):
                    total += part
        ctx.save_for_backward(*gradients)
        values = torch.stack(pieces).sum(0) / divisor
        ctx.mark_non_differentiable(values)
        return (values * values.new_tensor(weights)).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss: Tensor, values: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *(gradient * loss for gradient in ctx.saved_tensors))


def _labelled(labels: Tensor) -> Tensor:
    """The places of labels in a flattened batch."""
    return (labels != -100).flatten().nonzero().squeeze(1)
