"""How alike two representations of the same tokens are, and how much of a drift a few tokens have."""

from __future__ import annotations

import math

import torch


def cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """Linear CKA of two representations of the same tokens, [tokens, width] each, of which the widths may differ: 1
    for one that is the other turned and scaled, about 0 for independent ones (Kornblith et al., arXiv 1905.00414).

    Debiased: the three HSIC in it are the unbiased estimates of Song et al. (JMLR 2012), without which independent
    representations come out near width / tokens (Murphy et al., arXiv 2405.01012). It may be below 0 a little, and
    varies much where tokens are not many more than channels. In float64, tokens against channels, so that no
    matrix of tokens by tokens is made.

    Raises ValueError for fewer than four tokens, and for a representation in which all are one point.
    """
    if len(first) != len(second) or len(first) < 4:
        raise ValueError(f"four tokens or more are needed in both, not {len(first)} and {len(second)}")
    # What is subtracted cancels in the unbiased estimate; the sums lose fewer digits without it.
    one, two = (each.double() - each.double().mean(0) for each in (first, second))
    own = _hsic(one, one) * _hsic(two, two)
    if own <= 0:
        raise ValueError("a representation in which all tokens are one point is like nothing")
    return _hsic(one, two) / math.sqrt(own)


def _hsic(one: torch.Tensor, two: torch.Tensor) -> float:
    """tokens (tokens - 3) times the unbiased HSIC of two linear kernels: of K = XX' and L = YY' without their
    diagonals tr(KL) + (1'K1)(1'L1) / ((n - 1)(n - 2)) - 2 (1'KL1) / (n - 2)."""
    n, diagonals = len(one), [each.square().sum(1) for each in (one, two)]
    sums = [each @ each.sum(0) - own for each, own in zip((one, two), diagonals, strict=True)]
    trace = (one.T @ two).square().sum() - diagonals[0] @ diagonals[1]
    means = sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2)) - 2 * (sums[0] @ sums[1]) / (n - 2)
    return float(trace + means)


def concentration(values: torch.Tensor, share: float = 0.2) -> float | None:
    """The part of the sum of `values`, [tokens], that the largest `share` of them has (rounded up to a token): that
    share where all are alike, 1 where the rest is 0. Values below 0 are rounding dust and count as 0. None where
    nothing adds up."""
    counted = values.double().clamp(min=0).sort(descending=True).values
    total = float(counted.sum())
    return float(counted[: math.ceil(share * len(counted))].sum()) / total if total else None
