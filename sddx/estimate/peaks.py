"""The peak memory of every stage on one device, and what would make it fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from sddx.compression.patches import Linear
from sddx.estimate import memory
from sddx.estimate.costs import Estimate
from sddx.estimate.skeleton import removed, skeleton
from sddx.estimate.texts import LONGEST, request
from sddx.importance.score import Work
from sddx.models.anatomy import blocks, decoder
from sddx.models.load import DTYPES

log = logging.getLogger(__name__)
CONTEXT = 0.7e9  # bytes that a CUDA process takes before its first tensor; ours
FRAGMENTS = 1.03  # what an allocator holds over what is asked of it; ours
NF4 = 0.28  # bytes of a weight in 4 bits with its scales, over its bytes in 16


def peaks(estimate: Estimate) -> dict[str, float]:
    """Peak bytes by stage: weights, and what the stage holds beside them. For training, rows are taken as long as
    max_length allows."""
    found = {"score": _scoring(estimate)} if estimate.scored else {}
    if not estimate.config["stages"]:
        # Where models are in shards, the proof of a pruned one is in host memory.
        found |= {} if _in_shards(estimate) else {"prune": estimate.unpruned.weight_bytes}
        found |= _later(estimate)
    return {stage: FRAGMENTS * held for stage, held in found.items()}


def _later(estimate: Estimate) -> dict[str, float]:
    found = {"patch": _patching(estimate)} if estimate.fit else {}
    if estimate.trains:
        if estimate.config["loss"]["data"] != "reference":
            found["distill"] = _distilling(estimate)
        found["train"] = _training(estimate)
    return found | {"evaluate": _evaluating(estimate)}


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
    """Weights, and the states of a batch at every block, its texts as long as they are; for gradients, those of all
    weights of the blocks and a pass over one text; for tasks, a pass of lm-eval."""
    return _looked_at(estimate) + max(_measuring(estimate, *each) for each in estimate.scored)


def _measuring(estimate: Estimate, metric: Any, work: Work) -> float:
    model, longest, batch = _whole(estimate), estimate.calibration.longest, estimate.calibration.side_by_side
    if work.models:
        return _judging(estimate, metric.value.batch_size, metric.value.tasks, metric.value.shots)
    if work.learned:
        decoder(model).requires_grad_(True)
        return _traced(memory.learning, model, 1, longest, checkpointing=False)
    return _traced(memory.reading, model, 1 if work.alone else batch, longest, states=True)


def _patching(estimate: Estimate) -> float:
    """Weights, and the states of a batch at every block or, if that is more, a retrained block in float32 with its
    moments while it learns from the batch; the sums of a regression in float64."""
    width = estimate.shape.hidden_size
    batch, longest = estimate.calibration.side_by_side, estimate.calibration.longest
    passing = _traced(memory.reading, _whole(estimate), batch, longest, states=True)
    if estimate.fit.reads == "preceding":
        block = skeleton(estimate.shape, "float32")
        removed(block, "blocks", estimate.unpruned.blocks - 1)
        weights = sum(w.numel() * w.element_size() for w in blocks(block).requires_grad_(True).parameters())
        learning = _traced(memory.learning, block, batch, longest, checkpointing=False)
        passing = max(passing, 3 * weights + learning)
    sums = 2 * 8 * width**2 * estimate.gaps if isinstance(estimate.fit, Linear) else 0
    return _looked_at(estimate) + passing + sums


def _distilling(estimate: Estimate) -> float:
    """Weights, the batch's cache when all its answers are as long as allowed, and a pass over its prompts (twice
    as long as the mean) with the logits of their last tokens. (vLLM fits its batches into the memory there is.)"""
    if "batch_size" not in estimate.config["generation"]:
        return estimate.unpruned.weight_bytes
    batch, longest = estimate.side_by_side, 2 * estimate.shown
    cache = batch * estimate.unpruned.cache_bytes * (longest + estimate.config["generation"]["max_new_tokens"])
    logits = 2 * batch * estimate.shape.vocab_size * 4
    passing = _traced(memory.reading, _whole(estimate), batch, int(longest) or 1)
    return _looked_at(estimate) + cache + logits + passing


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
    """Weights of student and teacher, and the optimiser's moments."""
    return _share(estimate, _unsharded(estimate))


def _looked_at(estimate: Estimate, others: float = 0.0) -> float:
    """Weights of the unpruned model, and `others`, where nothing is trained; in shards, embeddings and head are
    whole on every device."""
    whole = 2 * estimate.unpruned.head * DTYPES[estimate.model["dtype"]].itemsize if _in_shards(estimate) else 0
    return _share(estimate, estimate.unpruned.weight_bytes + others - whole) + whole


def _in_shards(estimate: Estimate) -> bool:
    return estimate.config["trainer"].get("strategy") == "fsdp"


def _share(estimate: Estimate, held: float) -> float:
    """What a device holds of so many bytes: all, or in shards its share and one block, whole, with the next one on
    its way."""
    if not _in_shards(estimate):
        return held
    sizes = estimate.unpruned
    return held / estimate.config["trainer"]["devices"] + 2 * sizes.weight_bytes / sizes.blocks


def _unsharded(estimate: Estimate) -> float:
    unpruned, pruned = estimate.unpruned.weight_bytes, estimate.pruned.weight_bytes
    each, needed, shared = DTYPES[estimate.model["dtype"]].itemsize, estimate.needs_teacher, estimate.shares_teacher
    teacher = estimate.teacher.weight_bytes if needed and not shared else 0
    if estimate.is_full:
        return pruned + teacher + 2 * each * estimate.trained
    frozen = unpruned if needed and shared else pruned
    head = 2 * estimate.unpruned.head * each  # stays in its dtype, as do embeddings
    quantised = "quantization" in estimate.config["tuning"]
    # The adapter and its moments are float32.
    return (head + NF4 * (frozen - head) if quantised else frozen) + teacher + 3 * 4 * estimate.trained


def _evaluating(estimate: Estimate) -> float:
    """The unpruned model's weights, in which the others are, and those of a model of its own weights beside it; a
    pass of lm-eval (not where vLLM evaluates), or one over held-out texts beside the other model's states."""
    evaluation, batch, longest = estimate.config["evaluation"], estimate.text.side_by_side, estimate.text.longest
    states = batch * longest * estimate.shape.hidden_size * DTYPES[estimate.model["dtype"]].itemsize
    passing = states + _traced(memory.reading, _whole(estimate), batch, longest)
    if not estimate.by_vllm:
        asked = evaluation["batch_size"], evaluation["tasks"], evaluation["shots"]
        passing = max(passing, _judging(estimate, *asked))
    own = estimate.pruned.weight_bytes if estimate.is_full and estimate.trains else 0
    return _looked_at(estimate, own) + passing


def _judging(estimate: Estimate, batch: int, tasks: Sequence[str], shots: Any) -> float:
    """A pass over the longest prompts, of which lm-eval holds the logits in the model's dtype and their logarithms
    in float32."""
    length = int(LONGEST * max(request(task, shots) for task in tasks)) or 1
    logits = batch * length * estimate.shape.vocab_size * (DTYPES[estimate.model["dtype"]].itemsize + 4)
    return logits + _traced(memory.reading, _whole(estimate), batch, length)


def remedies(estimate: Estimate, room: float) -> list[str]:
    """The overrides, each alone, with which training would fit into so many bytes; the largest smaller batch."""
    trainer, tuning = estimate.config["trainer"], estimate.config["tuning"]
    rows, steps = trainer["batch_size"], trainer["accumulate"]
    found = [
        ("trainer.gradient_checkpointing=true", {"trainer": {**trainer, "gradient_checkpointing": True}}),
        ("tuning=qlora", {"tuning": {**tuning, "quantization": {}}}),
    ]
    fitting = [name for name, change in found if _fits(estimate.varied(**change), room)]
    while rows > 1:
        rows, steps = rows // 2, steps * 2
        if _fits(estimate.varied(trainer={**trainer, "batch_size": rows, "accumulate": steps}), room):
            return [*fitting, f"trainer.batch_size={rows} trainer.accumulate={steps}"]
    return fitting


def _fits(estimate: Estimate, room: float) -> bool:
    return FRAGMENTS * _training(estimate) + CONTEXT <= room
