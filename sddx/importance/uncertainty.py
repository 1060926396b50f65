"""What chance does to scores: standard errors, intervals, and which units are known to be the lowest.

A score is a mean over whatever was drawn, by one or several independent draws that cross each other: every text is
read under every order. `sources` has the estimate's parts by each of them: the means by text [texts, units], the
means by pair of orders [pairs, units], and so on; the mean over the rows of each is the score itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LEVEL = 0.95
DRAWS = 2000  # by which it is told whether the units of least value are known

Sources = Mapping[str, Tensor]


def errors(sources: Sources) -> dict[str, Any]:
    """{"stderr", "half_width" of the 95 % interval} by unit, None where a source was drawn from once only; and
    under "stderr_of" the standard errors by source, where there are several.

    The variances of the sources' means add up (a two-way random-effects model; what text and order do together is
    in both, so that the sum is too large if anything). In the interval each variance is taken times its own
    t(drawn - 1) squared. It is at least as wide as Cochran's for variances v of unlike freedom (Cochran and Cox,
    Experimental Designs, 4.14), whose factor is the mean of the t weighted by the v: (sum of t v)^2 / (sum of v) is
    at most the sum of t^2 v.
    """
    if any(len(parts) < 2 for parts in sources.values()):
        return {"stderr": None, "half_width": None}
    variances = {name: parts.double().var(0) / len(parts) for name, parts in sources.items()}
    reach = sum(quantile(len(sources[name])) ** 2 * variance for name, variance in variances.items())
    overall = {
        "stderr": torch.stack([*variances.values()]).sum(0).sqrt().tolist(),
        "half_width": reach.sqrt().tolist(),
    }
    apart = {"stderr_of": {name: variance.sqrt().tolist() for name, variance in variances.items()}}
    return overall | (apart if len(sources) > 1 else {})


def quantile(drawn: int) -> float:
    """How many standard errors the 95 % interval of a mean of so many reaches to each side: Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(drawn - 1, (1 + LEVEL) / 2))


def membership(sources: Sources, lowest: int, seed: int) -> float:
    """The share of `possible` scores in which the `lowest` units of least score are those of the estimate."""
    drawn = possible(sources, seed).argsort(1)[:, :lowest].sort(1).values
    estimate = next(iter(sources.values())).double().mean(0).argsort()[:lowest].sort().values
    return float((drawn == estimate).all(1).double().mean())


def possible(sources: Sources, seed: int) -> Tensor:
    """Where the true scores may lie: DRAWS of all units together [draws, units]. The estimate and, for each source,
    an error that is multivariate t with that source's covariances between units (Behrens and Fisher's solution)."""
    dice = torch.Generator().manual_seed(seed)
    scores = next(iter(sources.values())).double().mean(0).expand(DRAWS, -1)
    for parts in sources.values():
        freedom = len(parts) - 1
        deviations = (parts - parts.mean(0)).double() / (len(parts) * freedom) ** 0.5
        noise = torch.randn(DRAWS, len(parts) + freedom, generator=dice).double()
        chi = noise[:, len(parts) :].square().mean(1, keepdim=True).sqrt()
        scores = scores + noise[:, : len(parts)] @ deviations / chi
    return scores
