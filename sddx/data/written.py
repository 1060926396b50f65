"""What the unpruned model wrote, set beside the references: whether it wrote at all, or copied."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from sddx.records import Rewrite

COPIED = 0.9  # ROUGE-L from which an answer counts as its reference copied


class _Words:
    """Splits a text into its words, in any script; rouge_score's own tokenizer knows the letters a to z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


_scorer = RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, from 0 to 1 (ROUGE-L; Lin, 2004)."""
    return float(_scorer.score(reference, answer)["rougeL"].fmeasure)


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
