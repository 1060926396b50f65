"""What an evaluation by lm-eval found, item by item. Behaviour that is relied on was read in lm-eval 0.4.13."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from sddx.errors import UserError
from sddx.evaluation.items import cluster_of
from sddx.evaluation.right_answers import MEASURES, measured
from sddx.evaluation.seeds import SEEDS
from sddx.evaluation.tasks import judged, said
from sddx.statistics.intervals import standard_error

# What lm-eval's regex filters give for an answer in which they find nothing.
NOT_PARSED = "[invalid]"


def _primary(task: Any, samples: Sequence[Mapping[str, Any]]) -> str:
    """The reported "metric,filter": as asked for or as the YAML's metadata says, or the first of each."""
    first = f"{samples[0]['metrics'][0]},{samples[0]['filter']}"
    return said(task).get("primary") or first


def record(task: Any, raw: Any, part_of: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What a task scored by lm-eval's `raw` results, as `harness.evaluate` says; `shared` are settings that the
    task does not know. Raises UserError where the primary metric is no mean over items."""
    name = task.get_config("task")
    primary = _primary(task, raw["samples"][name])
    samples = _samples(task, raw["samples"][name], primary)
    scores = [sample["score"] for sample in samples]
    metrics = numbers(raw["results"][name])
    score = sum(scores) / len(scores)
    if abs(score - metrics[primary]) > 1e-6:
        raise UserError(
            f"The metric {primary!r} of {name!r} is not a mean over items (lm-eval says {metrics[primary]}, "
            f"the mean is {score}). Choose one that is with evaluation.primary."
        )
    return {
        "score": score,
        "stderr": standard_error(scores, clusters_of(samples)),
        "chance": said(task).get("chance"),
        "n": len(samples),
        "metrics": metrics,
        **{measure: _mean([sample[measure] for sample in samples]) for measure in MEASURES},
        "unparsed": _unparsed(task, samples),
        "part_of": part_of,
        "settings": _settings(task, raw["versions"][name], primary, shared),
        "samples": samples,
    }


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures among lm-eval's, but their errors."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if "," in name and "_stderr" not in name and isinstance(value, (int, float))
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def clusters_of(samples: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The cluster of each item, of which it may be the only one; None where each is a draw by itself."""
    clusters = [sample.get("cluster") for sample in samples]
    return [each or f"item {place}" for place, each in enumerate(clusters)] if any(clusters) else None


def _samples(task: Any, rows: Sequence[Mapping[str, Any]], primary: str) -> list[dict[str, Any]]:
    """One dict per item from lm-eval's one per item and filter."""
    items: dict[int, dict[str, Any]] = {}
    for row in rows:
        item = items.setdefault(row["doc_id"], _item(task, row))
        item["metrics"] |= {f"{metric},{row['filter']}": row[metric] for metric in row["metrics"]}
        if item["response"] is not None:
            item["answers"][row["filter"]] = row["filtered_resps"][0]
    for item in items.values():
        metrics = item["metrics"]
        item["score"] = _as_number(metrics[primary], primary)
        item["metrics"] = {name: float(v) for name, v in metrics.items() if not isinstance(v, (tuple, list))}
    return [items[index] for index in sorted(items)]


def _item(task: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same under every filter. First responses only: `repeats` above 1 is left to the filters."""
    first = [responses[0] for responses in row["resps"]]
    generated = isinstance(first[0], str)
    likelihoods = None if generated else [r[0] if isinstance(r, tuple) else r for r in first]
    cluster = cluster_of(task, row["doc"])
    return {
        "doc_id": row["doc_id"],
        "doc_hash": row["doc_hash"],
        "prompt_hash": row["prompt_hash"],
        "target_hash": row["target_hash"],
        "metrics": {},
        "response": first[0] if generated else None,
        "answers": {},
        "likelihoods": likelihoods,
        **measured(task, row, likelihoods),
        "cluster": cluster and short_digest(cluster),
    }


def _as_number(value: Any, metric: str) -> float:
    if isinstance(value, (tuple, list)):
        raise UserError(
            f"The metric {metric!r} gives no score per item, which recovery and its interval need. "
            "Name another one in the task's metadata (primary) or in evaluation.primary."
        )
    return float(value)


def _unparsed(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of answers in which a filter that extracts by regular expression found nothing, by filter."""
    filters = task.get_config("filter_list") or []
    extracting = [f["name"] for f in filters if any("regex" in step["function"] for step in f["filter"])]
    return {
        name: sum(sample["answers"].get(name) == NOT_PARSED for sample in samples) / len(samples)
        for name in extracting
    }


def _settings(task: Any, version: Any, primary: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What two evaluations must share to be compared: `shared`, which the task does not know (`chat_template` is a
    digest of it and of its settings, or None), and what it does."""
    import lm_eval

    return {
        "version": version,
        "split": judged(task),
        "primary": primary,
        "shots": task.get_config("num_fewshot"),
        "filters": json.loads(json.dumps(task.get_config("filter_list"), default=_name)),
        "generation": json.loads(json.dumps(task.get_config("generation_kwargs"), default=_name)),
        "seeds": SEEDS,
        "lm_eval": lm_eval.__version__,
        **shared,
    }


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", str(function))


def short_digest(text: str) -> str:
    """16 characters that tell one text from another."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compact(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What recovery and comparisons need of `evaluate`'s results, by task: `scores` and `hashes` per item (a
    digest of document, prompt and target), `clusters`, `bits_per_byte` and `margin` per item (each None where there
    is none), `settings`, `chance`, `part_of` and `apart`. Plain JSON."""
    return {
        name: {
            "scores": [sample["score"] for sample in record["samples"]],
            "hashes": [
                short_digest(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"])
                for sample in record["samples"]
            ],
            "clusters": clusters_of(record["samples"]),
            **{measure: _known(record["samples"], measure) for measure in MEASURES},
            "settings": record["settings"],
            "chance": record["chance"],
            "part_of": record["part_of"],
            "apart": record.get("apart", False),
        }
        for name, record in results["tasks"].items()
    }


def _known(samples: Sequence[Mapping[str, Any]], measure: str) -> list[float] | None:
    values = [sample.get(measure) for sample in samples]
    return None if None in values else values  # type: ignore[return-value]


def responses(results: Mapping[str, Any]) -> list[str]:
    """All generated answers, for measures of the text itself."""
    records = results["tasks"].values()
    return [s["response"] for record in records for s in record["samples"] if s["response"] is not None]
