"""Answers that can be read in several ways: what a task scores under each filter, and what no filter could read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from statistics import mean
from typing import Any, NamedTuple

Key = tuple[str, str]  # a reported task, and "metric,filter" as lm-eval names it


class Reading(NamedTuple):
    """A score under one filter, and the share of answers in which the filter found nothing (None: it extracts
    nothing)."""

    score: float
    unparsed: float | None


def read_variously(summaries: Iterable[Mapping[str, Any]]) -> set[str]:
    """The tasks with more than one filter, and those of which any model of these runs left an answer unparsed."""
    models = [_all(summary, model) for summary in summaries for model in summary.get("metrics", {})]
    filters = {(task, metric.partition(",")[2]) for read in models for task, metric in read}
    several = [task for task, _ in filters]
    unparsed = {task for read in models for (task, _), reading in read.items() if reading.unparsed}
    return {task for task in several if several.count(task) > 1} | unparsed


def readings(summary: Mapping[str, Any], tasks: Collection[str]) -> dict[str, dict[Key, Reading]]:
    """By model, the readings of these tasks. The parts of a task count equally, as they do in its score."""
    by_model = {model: _all(summary, model) for model in summary.get("metrics", {})}
    return {model: {key: read[key] for key in read if key[0] in tasks} for model, read in by_model.items()}


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
