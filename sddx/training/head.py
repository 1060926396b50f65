"""The head, applied to labelled positions only and chunk by chunk: no [batch, time, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sddx.records import Outputs
from sddx.training.objective import Distilled, Supervised


def token_sums(
    terms: Mapping[str, Supervised | Distilled],
    student: Outputs,
    teacher: Outputs | None,
    labels: Tensor,
    *,
    chunk: int = 256,
) -> dict[str, Tensor]:
    """Each term summed over the labelled positions (labels [batch, time] not -100): name -> scalar.

    Logits exist for `chunk` rows at a time and are computed again in the backward pass, so memory does not
    grow with the batch. The chunk size changes nothing but the order of a sum. Without a label the sums are
    0, and so are their gradients.
    """
    rows = (labels != -100).flatten().nonzero().squeeze(1)
    hidden = student.hidden.flatten(0, 1)[rows]
    labels = labels.flatten()[rows]
    teacher_hidden = None if teacher is None else teacher.hidden.flatten(0, 1)[rows]

    def piece(start: int, hidden: Tensor) -> Tensor:
        here = slice(start, start + chunk)
        logits = student.head(hidden)
        teacher_logits = None
        if teacher is not None and teacher_hidden is not None:
            with torch.no_grad():
                teacher_logits = teacher.head(teacher_hidden[here])
        return torch.stack([t.per_token(logits, labels[here], teacher_logits).sum() for t in terms.values()])

    pieces = hidden.split(chunk)
    # A single chunk fits in memory by definition, so computing it twice would buy nothing.
    if len(pieces) == 1:
        sums = piece(0, hidden)
    else:
        sums = torch.stack(
            [checkpoint(piece, i * chunk, part, use_reentrant=False) for i, part in enumerate(pieces)]
        ).sum(0)
    return dict(zip(terms, sums.unbind(), strict=True))
