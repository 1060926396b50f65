"""What the unpruned model wrote, set beside the references: whether it wrote at all, or copied."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from sddx.records import Rewrite

COPIED = 0.9  # ROUGE-L from which an answer counts as its reference copied


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, in lower case and any script, from 0 to 1 (ROUGE-L of
    one sentence; Lin, 2004). 0 where one of them has no word."""
    written, expected = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    return 2 * _longest_common(written, expected) / max(len(written) + len(expected), 1)


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest sequence of words that stands in both, in order and with gaps."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def measured(rewrites: Sequence[Rewrite], cut_off: str) -> dict[str, Any]:
    """Of all answers: how many `rows`, the shares `accepted`, `cut_off` (refused for that reason) and `copied`, the
    mean `rouge_l` to the references, and the mean number of `words` of reference and answer. What compares texts
    counts the rows with an answer; None where there is nothing to take a mean of."""
    answered = [rewrite for rewrite in rewrites if rewrite.answer.strip()]
    overlaps = [rouge_l(rewrite.answer, rewrite.reference) for rewrite in answered]
    return {
        "rows": len(rewrites),
        "accepted": _share([not rewrite.reason for rewrite in rewrites]),
        "cut_off": _share([rewrite.reason == cut_off for rewrite in rewrites]),
        "copied": _share([overlap >= COPIED for overlap in overlaps]),
        "rouge_l": _share(overlaps),
        "words": {
            "reference": _share([len(rewrite.reference.split()) for rewrite in answered]),
            "self": _share([len(rewrite.answer.split()) for rewrite in answered]),
        },
    }


def _share(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
