"""Repetition and length of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def repetition(responses: Sequence[str], *, n: int = 4) -> float | None:
    """Share of n-grams of words that occurred before in the same response; None where none has n words."""
    grams = [_grams(response.split(), n) for response in responses]
    total = sum(map(len, grams))
    return 1 - sum(len(set(each)) for each in grams) / total if total else None


def _grams(words: Sequence[Any], n: int) -> list[tuple]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def mean_length(responses: Sequence[str]) -> float | None:
    """Mean number of words of the responses; None where there are none."""
    return sum(len(response.split()) for response in responses) / len(responses) if responses else None
