"""Distributions over a vocabulary in k + 1 buckets: some tokens, each by itself, and all others together.

Merging the outcomes of two distributions can only lower a divergence between them (the data processing inequality),
so what is compared in buckets is a lower bound, which grows with k and is exact where k is the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sddx.records import Coarse
from sddx.training.losses import exact

CHUNK = 256  # rows of logits that are made at once where a teacher is captured


def likeliest(logits: Tensor, k: int, temperature: float) -> Coarse:
    """The `k` likeliest tokens of each row of logits [rows, vocabulary], and the rest in one bucket, after the
    softmax at this temperature over the whole vocabulary."""
    logs = (exact(logits) / temperature).log_softmax(-1)
    ids = logs.topk(k, dim=-1).indices
    return Coarse(ids, _Buckets.apply(logs, ids, 1.0), temperature)


def mass(coarse: Coarse) -> Tensor:
    """The share of the probability that the tokens which stand by themselves have: [rows]."""
    return coarse.logs[:, : coarse.ids.shape[1]].exp().sum(-1)


def alike(logits: Tensor, coarse: Coarse) -> tuple[Tensor, Tensor]:
    """One model's logits [rows, vocabulary] and another's coarse distribution in the same buckets: two of [rows,
    k + 1], whose softmax at the coarse one's temperature is the probability of each bucket. Gradients flow into the
    first."""
    return _Buckets.apply(logits, coarse.ids, coarse.temperature), coarse.logs * coarse.temperature


class _Buckets(torch.autograd.Function):
    """Logits [rows, vocabulary] to those of buckets at a temperature T: the tokens `ids` [rows, k] as they are,
    then T log of the sum of exp(logit / T) over all others, where there are any.

    Autograd would keep and make several tensors as large as the logits. The sum is taken over the others
    themselves, since 1 minus the share of the first ones is noise where these have almost all.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        top, others = exact(logits.gather(1, ids)), ids.shape[1] < logits.shape[1]
        ctx.temperature, rest = temperature, top.new_empty(len(top), 0)
        if others:
            masked = exact(logits).scatter(1, ids, -torch.inf)
            most = masked.amax(1, keepdim=True)
            shares = _softened_(masked.sub_(most), temperature).exp_()
            rest = most + temperature * shares.sum(1, keepdim=True).log_()
        ctx.save_for_backward(logits, ids, rest)
        return torch.cat([top, rest], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (logits, ids, rest) = gradients, ctx.saved_tensors
        k = ids.shape[1]
        if k == logits.shape[1]:
            spread = torch.empty_like(gradient)
        else:
            shares = _softened_(exact(logits) - rest, ctx.temperature).exp_()
            spread = shares.mul_(gradient[:, k:])
        return spread.scatter_(1, ids, gradient[:, :k]).to(logits.dtype), None, None


def _softened_(logits: Tensor, temperature: float) -> Tensor:
    """In place: another pass over so many numbers is what this is spared."""
    return logits if temperature == 1 else logits.div_(temperature)
