"""What writing self-data takes."""

from __future__ import annotations

from collections.abc import Iterator

from sddx.data.shards import SHARD_ROWS
from sddx.estimate import peaks
from sddx.estimate.costs import Estimate, Part
from sddx.estimate.efforts import Effort
from sddx.estimate.texts import LONGEST

TEMPLATE = 80  # tokens that a rewriting template adds; ours
SMALLER = "generation.batch_size"  # what to lower where its memory does not suffice


def parts(estimate: Estimate) -> Iterator[Part]:
    """The answers to each shard of rows, those that are held out first."""
    if not estimate.rewrites:
        return
    config, generation = estimate.config, estimate.config["generation"]
    about = [{k: v for k, v in config["dataset"].items() if k != "size"}, generation, config["loss"]["data"]]
    about.append(config["selfdata"].get("reference", "right"))
    longest = min(LONGEST * estimate.answer, generation["max_new_tokens"])
    side_by_side = _side_by_side(estimate)
    step = {"rows": side_by_side, "cached": side_by_side * (_shown(estimate) + longest / 2)}
    for number, rows in enumerate([config["validation"], *_shards(estimate.rows.count)]):
        if rows:
            effort = _effort(estimate, rows)
            yield estimate.part("distill", [*about, number, rows], estimate.unpruned, effort, **step)


def peak(estimate: Estimate) -> float | None:
    """Weights, the batch's cache when all its answers are as long as allowed, and a pass over its prompts (twice
    as long as the mean) with the logits of their last tokens. (vLLM fits its batches into the memory there is.)"""
    if not estimate.rewrites:
        return None
    if "batch_size" not in estimate.config["generation"]:
        return estimate.unpruned.weight_bytes
    batch, longest = _side_by_side(estimate), 2 * _shown(estimate)
    cache = batch * estimate.unpruned.cache_bytes * (longest + estimate.config["generation"]["max_new_tokens"])
    logits = 2 * batch * estimate.shape.vocab_size * 4
    return peaks.looked_at(estimate) + cache + logits + peaks.passing(estimate, batch, int(longest) or 1)


def _shown(estimate: Estimate) -> float:
    """Tokens of the prompt that an answer is written to: with the reference in it, or alone."""
    guided = estimate.config["loss"]["data"] == "self"
    return estimate.rows.prompt + (TEMPLATE + estimate.rows.answer if guided else 0)


def _side_by_side(estimate: Estimate) -> int:
    """Rows that are written at once."""
    return estimate.config["generation"].get("batch_size") or SHARD_ROWS


def _effort(estimate: Estimate, rows: int) -> Effort:
    """The unpruned model's answers to a shard of rows; a batch waits for its longest."""
    shown, most = _shown(estimate), estimate.config["generation"]["max_new_tokens"]
    return Effort(
        reading=rows * shown * estimate.unpruned.prefill(shown),
        steps=min(LONGEST * estimate.answer, most) * -(-rows // _side_by_side(estimate)),
        read=rows * shown,
        written=rows * min(estimate.answer, most),
    )


def _shards(rows: int) -> list[int]:
    whole, rest = divmod(rows, SHARD_ROWS)
    return [SHARD_ROWS] * whole + ([rest] if rest else [])
