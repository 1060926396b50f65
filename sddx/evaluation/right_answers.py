"""Measures of less noise than right or wrong, from the likelihoods that lm-eval computed for a score anyway."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# With what each is measured in.
MEASURES = {"bits_per_byte": "bits per byte of the right answer", "margin": "margin of the right answer, nats"}
SCORED = ("loglikelihood", "multiple_choice")


def measured(task: Any, row: Mapping[str, Any], likelihoods: Sequence[float] | None) -> dict[str, float | None]:
    """An item's measures, from one of lm-eval's samples and its log-probabilities in nats, one per request.

    bits_per_byte = -log2 p(right answer | prompt) / the UTF-8 bytes of what was scored, with the space before it.
    margin = log p(right answer) - log p(the likeliest wrong one), where there are choices. Of several right answers
    the likeliest counts. None where answers are written, where code of the task's author says what is right, and
    where a probability is 0.
    """
    nothing: dict[str, float | None] = dict.fromkeys(MEASURES)
    if likelihoods is None or task.OUTPUT_TYPE not in SCORED:
        return nothing
    one = task.OUTPUT_TYPE == "loglikelihood"
    right = [0] if one else _right(task, row["doc"])
    if not right or not all(map(math.isfinite, likelihoods)):
        return nothing
    best = max(right, key=lambda place: likelihoods[place])
    size = len(row["arguments"][best][1].encode())
    choices = 0 if one else len(task.doc_to_choice(row["doc"]))  # further requests are for other metrics
    wrong = [likelihoods[place] for place in range(choices) if place not in right]
    return {
        "bits_per_byte": -likelihoods[best] / math.log(2) / size if size else None,
        "margin": likelihoods[best] - max(wrong) if wrong else None,
    }


def _right(task: Any, document: Any) -> list[int]:
    """The numbers of the right choices, as lm-eval reads them; none where the author's code does."""
    if callable(task.get_config("process_results")) or not hasattr(task, "multiple_input"):
        return []
    choices = task.doc_to_choice(document)
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    named = gold if isinstance(gold, list) else [gold]
    places = [choices.index(each) if isinstance(each, str) and each in choices else each for each in named]
    return [place for place in places if isinstance(place, int) and 0 <= place < len(choices)]
