"""The peak memory of every stage on one device, and what would make it fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from sddx.estimate import memory
from sddx.estimate.costs import SCORED, TEXT_BATCH, Estimate
from sddx.estimate.skeleton import skeleton
from sddx.estimate.texts import text_tokens
from sddx.models.load import DTYPES

log = logging.getLogger(__name__)
CONTEXT = 0.7e9  # bytes that a CUDA process takes before its first tensor; ours
FRAGMENTS = 1.03  # what an allocator holds over what is asked of it; ours
LONGEST = 2.5  # the longest prompt of a task in mean ones, which lm-eval runs first; ours
NF4 = 0.28  # bytes of a weight in 4 bits with its scales, over its bytes in 16


def peaks(estimate: Estimate) -> dict[str, float]:
    """Peak bytes by stage: weights, and what the stage holds beside them. For training, rows are taken as long as
    max_length allows."""
    scored = {"score": _scoring(estimate)} if estimate.config["pruning"].get("metric") else {}
    found = scored | {"prune": estimate.unpruned.weight_bytes}
    if estimate.config["loss"]["terms"]:
        if estimate.config["loss"]["data"] != "reference":
            found["distill"] = _distilling(estimate)
        found["train"] = _training(estimate)
    found["evaluate"] = _evaluating(estimate)
    return {stage: FRAGMENTS * held for stage, held in found.items()}


def _traced(trace: Callable[..., int], *given: Any, **settings: Any) -> int:
    """What a traced pass holds; nothing, with a word, where a family cannot run without numbers (experts, in some
    dtypes)."""
    try:
        return trace(*given, **settings)
    except (RuntimeError, AttributeError) as error:
        log.warning("memory beyond the weights is not known for this model: %s", str(error).splitlines()[0])
        return 0


def _whole(estimate: Estimate) -> Any:
    return skeleton(estimate.shape, estimate.model["dtype"])


def _scoring(estimate: Estimate) -> float:
    """Weights, and the states of a batch at every block, its texts as long as they may be (those at hand: as they
    are on average)."""
    node = estimate.config["calibration"]
    _, mean = text_tokens(node, estimate.tokens, SCORED)
    length = SCORED if "split" in node and "name" in node else int(2 * mean) or 1
    return estimate.unpruned.weight_bytes + _traced(
        memory.reading, _whole(estimate), TEXT_BATCH, length, states=True
    )


def _distilling(estimate: Estimate) -> float:
    """Weights, the batch's cache when all its answers are as long as allowed, and a pass over its prompts (twice
    as long as the mean) with the logits of their last tokens."""
    batch, longest = estimate.writing, 2 * estimate.shown
    cache = batch * estimate.unpruned.cache_bytes * (longest + estimate.config["generation"]["max_new_tokens"])
    logits = 2 * batch * estimate.shape.vocab_size * 4
    passing = _traced(memory.reading, _whole(estimate), batch, int(longest) or 1)
    return estimate.unpruned.weight_bytes + cache + logits + passing


def _training(estimate: Estimate) -> float:
    """Weights, a pass over a batch of the longest rows with its gradients, the two moments of what is trained, and
    one chunk of the head."""
    config, trainer = estimate.config, estimate.config["trainer"]
    passing = _traced(
        memory.learning,
        estimate.student(),
        trainer["batch_size"],
        config["max_length"],
        checkpointing=bool(trainer.get("gradient_checkpointing")),
    )
    # The head's logits in the model's dtype, in float32, and the gradients of both.
    chunk = trainer["head_chunk"] * estimate.shape.vocab_size * 2 * (DTYPES[estimate.model["dtype"]].itemsize + 4)
    return _held(estimate) + passing + chunk


def _held(estimate: Estimate) -> float:
    """Weights of student and teacher, and the optimiser's moments; in shards, a device's share of them and one
    block, whole, with the next one on its way."""
    trainer = estimate.config["trainer"]
    held, sizes = _unsharded(estimate), estimate.unpruned
    if trainer.get("strategy") != "fsdp":
        return held
    return held / trainer["devices"] + 2 * sizes.weight_bytes / sizes.blocks


def _unsharded(estimate: Estimate) -> float:
    unpruned, pruned = estimate.unpruned.weight_bytes, estimate.pruned.weight_bytes
    if estimate.is_full:
        each = DTYPES[estimate.model["dtype"]].itemsize
        return pruned + (unpruned if estimate.needs_teacher else 0) + 2 * each * estimate.trained
    frozen = unpruned if estimate.needs_teacher else pruned
    head = (
        2 * estimate.unpruned.head * DTYPES[estimate.model["dtype"]].itemsize
    )  # stays in its dtype, as do embeddings
    quantised = estimate.config["tuning"]["_target_"].endswith("qlora")
    # The adapter and its moments are float32.
    return (head + NF4 * (frozen - head) if quantised else frozen) + 3 * 4 * estimate.trained


def _evaluating(estimate: Estimate) -> float:
    evaluation = estimate.config["evaluation"]
    batch, length = evaluation["batch_size"], int(LONGEST * max(map(estimate.length, evaluation["tasks"]))) or 1
    # lm-eval holds a batch's logits in the model's dtype and their logarithms in float32.
    logits = batch * length * estimate.shape.vocab_size * (DTYPES[estimate.model["dtype"]].itemsize + 4)
    return estimate.unpruned.weight_bytes + logits + _traced(memory.reading, _whole(estimate), batch, length)


def remedies(config: Mapping[str, Any], room: float) -> list[str]:
    """The overrides, each alone, with which training would fit into so many bytes; the largest smaller batch."""
    trainer, rows, steps = config["trainer"], config["trainer"]["batch_size"], config["trainer"]["accumulate"]
    found = [
        ("trainer.gradient_checkpointing=true", {"trainer": {**trainer, "gradient_checkpointing": True}}),
        ("tuning=qlora", {"tuning": {**config["tuning"], "_target_": "sddx.training.tuning.qlora"}}),
    ]
    fitting = [name for name, change in found if _fits({**config, **change}, room)]
    while rows > 1:
        rows, steps = rows // 2, steps * 2
        if _fits({**config, "trainer": {**trainer, "batch_size": rows, "accumulate": steps}}, room):
            return [*fitting, f"trainer.batch_size={rows} trainer.accumulate={steps}"]
    return fitting


def _fits(config: Mapping[str, Any], room: float) -> bool:
    return FRAGMENTS * _training(Estimate(config)) + CONTEXT <= room
