"""Whether one of several answers is right, from how many of more answers were."""

from __future__ import annotations

from math import comb


def pass_at(k: int, right: int, answers: int) -> float:
    """The chance that one of `k` answers is right, drawn without replacement from `answers` of which `right` are:
    1 - C(answers - right, k) / C(answers, k). On average over answers that are drawn anew it is the chance that one
    of k new ones is right (Chen et al., arXiv 2107.03374). In whole numbers, so that nothing overflows.

    Raises ValueError for fewer than 2k answers: it varies too much, and at k answers is 0 or 1.
    """
    if not (0 <= right <= answers and 1 <= k and 2 * k <= answers):
        raise ValueError(f"pass@{k} needs {2 * k} answers or more, not {answers} of which {right} are right")
    return 1 - comb(answers - right, k) / comb(answers, k)
