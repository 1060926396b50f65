"""What a search for the shares of a merge takes: the evaluation of every candidate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sddx.config.build import build
from sddx.estimate import peaks
from sddx.estimate.costs import LEARNED, Estimate, Part
from sddx.estimate.efforts import judging
from sddx.estimate.texts import request

SMALLER = "merging.search.evaluation.batch_size"  # what to lower where its memory does not suffice


def parts(estimate: Estimate) -> Iterator[Part]:
    """The plain merge and, at most, all candidates beside it."""
    if not (search := _search(estimate)):
        return
    evaluation = search["evaluation"]
    asked = [evaluation[name] for name in ("tasks", "limit", "batch_size", "shots", "max_new_tokens")]
    asked.append((evaluation.get("data_dir"), evaluation.get("side")))
    effort = judging(estimate.pruned, *asked)
    longest = max(request(task, evaluation["shots"]) for task in evaluation["tasks"])
    about = [estimate.config["merging"], [estimate.config[each] for each in LEARNED]]
    cached = evaluation["batch_size"] * longest
    yield estimate.part("shares", about, estimate.pruned, effort * (1 + build(search["by"]).most), cached)


def peak(estimate: Estimate) -> float | None:
    """One candidate and a pass of lm-eval over it; before that a base model, of which the students are made."""
    if not (search := _search(estimate)):
        return None
    evaluation = search["evaluation"]
    passing = peaks.judging(estimate, evaluation["batch_size"], evaluation["tasks"], evaluation["shots"])
    return max(estimate.pruned.weight_bytes + passing, estimate.unpruned.weight_bytes)


def _search(estimate: Estimate) -> Any:
    return (estimate.config.get("merging") or {}).get("search")
