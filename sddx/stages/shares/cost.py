"""What a search for the shares of a merge takes: the evaluation of every candidate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sddx.config.build import build
from sddx.estimate import peaks
from sddx.estimate.costs import LEARNED, Estimate, Part

SMALLER = "merging.search.evaluation.batch_size"  # what to lower where its memory does not suffice


def parts(estimate: Estimate) -> Iterator[Part]:
    """The plain merge and, at most, all candidates beside it."""
    if not (search := _search(estimate)):
        return
    asked = estimate.judging(search["evaluation"])
    effort = asked.effort(estimate.pruned) * (1 + build(search["by"]).most)
    about = [estimate.config["merging"], [estimate.config[each] for each in LEARNED]]
    yield estimate.part("shares", about, estimate.pruned, effort, cached=asked.cached, rows=asked.batch_size)


def peak(estimate: Estimate) -> float | None:
    """One candidate and a pass of lm-eval over it; before that a base model, of which the students are made."""
    if not (search := _search(estimate)):
        return None
    passing = peaks.judging(estimate, estimate.judging(search["evaluation"]))
    return max(estimate.pruned.weight_bytes + passing, estimate.unpruned.weight_bytes)


def _search(estimate: Estimate) -> Any:
    return (estimate.config.get("merging") or {}).get("search")
