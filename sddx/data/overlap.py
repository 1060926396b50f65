"""How much of an evaluation stands in the training rows: shared word n-grams."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

WORDS = 13  # as GPT-3's contamination study took it (arXiv 2005.14165, appendix C)


def overlapping(training: Iterable[str], evaluation: Sequence[str], n: int = WORDS) -> list[int]:
    """The places of the evaluation texts that share a run of at least `n` words with a training text, ascending.

    Words are runs of letters and digits in lower case, so punctuation and layout do not count. A text of fewer
    than `n` words overlaps where all of it, in order, stands in a training text; one without words never does.
    The training texts are read once, one at a time; memory grows with the evaluation only. Runs are compared by
    64-bit hash.
    """
    places: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # by length of run, by hash
    for place, text in enumerate(evaluation):
        words = _words(text)
        for run in _runs(words, min(n, len(words))):
            places[min(n, len(words))][run].append(place)
    hit: set[int] = set()
    for text in training:
        words = _words(text)
        for length, runs in places.items():
            hit.update(place for run in _runs(words, length) & runs.keys() for place in runs[run])
    return sorted(hit)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _runs(words: list[str], length: int) -> set[int]:
    """The hash of every run of `length` words; none for an empty text."""
    starts = range(len(words) - length + 1 if length else 0)
    return {hash(tuple(words[start : start + length])) for start in starts}
