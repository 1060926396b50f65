"""Quality beyond scores: distance from the unpruned model, and perplexity on text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from sddx.models.outputs import run
from sddx.records import Batch, Outputs

Places = Callable[[Batch], torch.Tensor]


def attended(batch: Batch) -> torch.Tensor:
    """The tokens that are no padding, a mask [batch, time]."""
    return batch.attention_mask.bool()


def labelled(batch: Batch) -> torch.Tensor:
    """Those of them that have a token to predict."""
    return attended(batch) & (batch.labels >= 0)


def divergence(
    teacher: Callable[..., Outputs], model: nn.Module, batches: Iterable[Batch], *, chunk: int = 512
) -> float:
    """KL(unpruned || model) in nats, the mean over attended tokens of held-out text (`divergences`). Raises
    ValueError where no token is attended."""
    values = divergences(teacher, model, batches, chunk=chunk)
    if not len(values):
        raise ValueError("there is no attended token to measure the divergence on")
    return float(values.mean())


@torch.no_grad()
def divergences(
    teacher: Callable[..., Outputs],
    model: nn.Module,
    batches: Iterable[Batch],
    places: Places = attended,
    *,
    chunk: int = 512,
) -> torch.Tensor:
    """KL(unpruned || model) in nats at each of the batches' `places`, in their order: float64 [tokens], on the CPU.

    `teacher(batch, states=False)` gives the unpruned model's outputs. Sum over the vocabulary of
    p (log p - log q), in float32; the heads are applied to `chunk` tokens at a time, so that no
    [batch, time, vocabulary] tensor is made.
    """
    values = [torch.zeros(0, dtype=torch.float64)]
    for batch in batches:
        mask = places(batch)
        expected, actual = teacher(batch, states=False), run(model, batch.input_ids, batch.attention_mask)
        pairs = zip(expected.hidden[mask].split(chunk), actual.hidden[mask].split(chunk), strict=True)
        values += [_divergence(expected.head(p), actual.head(q)) for p, q in pairs]
    return torch.cat(values)


def _divergence(expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    log_p, log_q = expected.float().log_softmax(-1), actual.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).double().cpu()


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Batch], *, chunk: int = 512) -> float | None:
    """exp of the mean cross-entropy over all attended tokens that have a label, each counting once whatever its
    text's length; None where there is none. Computed in `chunk`s as in `divergences`, and added up in float64."""
    total, tokens = 0.0, 0
    for batch in batches:
        mask = labelled(batch)
        outputs = run(model, batch.input_ids, batch.attention_mask)
        pairs = zip(outputs.hidden[mask].split(chunk), batch.labels[mask].split(chunk), strict=True)
        total += sum(_cross_entropy(outputs.head(hidden), labels) for hidden, labels in pairs)
        tokens += int(mask.sum())
    # Not math.exp, which raises where a ruined model is beyond all numbers.
    return float(torch.tensor(total / tokens, dtype=torch.float64).exp()) if tokens else None


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float(nn.functional.cross_entropy(logits.float(), labels, reduction="none").double().sum())
