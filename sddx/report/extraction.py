"""Answers that can be read in several ways: what a task scores under each filter, and what no filter could read."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any, NamedTuple

Key = tuple[str, str]  # a reported task, and "metric,filter" as lm-eval names it


class Reading(NamedTuple):
    """A score under one filter, and the share of answers in which the filter found nothing (None: it extracts
    nothing)."""

    score: float
    unparsed: float | None


def readings(summary: Mapping[str, Any]) -> dict[str, dict[Key, Reading]]:
    """By model, the readings of every task with more than one filter, or of which a model left an answer unparsed.
    The parts of a task count equally, as they do in its score."""
    by_model = {model: _all(summary, model) for model in summary.get("metrics", {})}
    filters = {(task, metric.partition(",")[2]) for read in by_model.values() for task, metric in read}
    several = [task for task, _ in filters]
    shown = {task for task in several if several.count(task) > 1}
    shown |= {task for read in by_model.values() for (task, _), reading in read.items() if reading.unparsed}
    return {model: {key: read[key] for key in read if key[0] in shown} for model, read in by_model.items()}


def _all(summary: Mapping[str, Any], model: str) -> dict[Key, Reading]:
    """Every metric of every task that a model was evaluated on."""
    scores: dict[Key, list[float]] = {}
    shares: dict[Key, list[float]] = {}
    for part, metrics in summary["metrics"][model].items():
        unparsed = summary.get("unparsed", {}).get(model, {}).get(part, {})
        for metric, score in metrics.items():
            key = summary.get("part_of", {}).get(part, part), metric
            scores.setdefault(key, []).append(score)
            if (share := unparsed.get(metric.partition(",")[2])) is not None:
                shares.setdefault(key, []).append(share)
    return {key: Reading(mean(scores[key]), mean(shares[key]) if key in shares else None) for key in scores}


def named(summary: Mapping[str, Any], key: Key) -> str:
    """A reading's "metric,filter", marked where it is the task's reported score."""
    task, metric = key
    primaries = {summary.get("primary", {}).get(part) for part, of in summary["part_of"].items() if of == task}
    return f"{metric} (primary)" if metric in primaries else metric
