"""Quality beyond scores: distance from the unpruned model, and perplexity on text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sddx.models.outputs import run
from sddx.records import Batch, Outputs

Places = Callable[[Batch], torch.Tensor]


def attended(batch: Batch) -> torch.Tensor:
    """The tokens that are no padding, a mask [batch, time]."""
    return batch.attention_mask.bool()


def labelled(batch: Batch) -> torch.Tensor:
    """Those of them that have a token to predict."""
    return attended(batch) & (batch.labels >= 0)


@torch.no_grad()
def held_out(
    model: nn.Module,
    batches: Iterable[Batch],
    teacher: Callable[..., Outputs] | None = None,
    *,
    chunk: int = 512,
) -> dict[str, float | None]:
    """What held-out text says of a model that reads it once: `kl`, KL(unpruned || model) in nats, the mean over
    attended tokens (see `divergences`; 0 where there is no `teacher`: the model is the unpruned one); and
    `perplexity`, exp of the mean cross-entropy over all attended tokens that have a label, each counting once
    whatever its text's length. None where there is no such token."""
    apart, losses = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.float64)]
    for batch in batches:
        outputs = run(model, batch.input_ids, batch.attention_mask)
        expected = teacher(batch, states=False) if teacher else None
        mask = attended(batch) if teacher else labelled(batch)
        for places in mask.nonzero().split(chunk):
            at = tuple(places.T)
            logits, labels = outputs.head(outputs.hidden[at]).float(), batch.labels[at]
            losses.append(cross_entropy(logits, labels, reduction="none")[labels >= 0].double().cpu())
            if expected is not None:
                apart.append(_divergence(expected.head(expected.hidden[at]), logits))
    kl, loss = _mean(apart), _mean(losses)
    # Not math.exp, which raises where a ruined model is beyond all numbers.
    perplexity = None if loss is None else float(torch.tensor(loss, dtype=torch.float64).exp())
    return {"kl": kl if teacher else 0.0, "perplexity": perplexity}


def _mean(values: list[torch.Tensor]) -> float | None:
    together = torch.cat(values)
    return float(together.mean()) if len(together) else None


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
