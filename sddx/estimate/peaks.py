"""The peak memory of every stage on one device, and what stages add it up from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sddx.config.shared import once
from sddx.estimate import memory
from sddx.estimate.costs import Estimate
from sddx.estimate.efforts import Judging
from sddx.estimate.skeleton import skeleton
from sddx.estimate.texts import LONGEST
from sddx.models.load import DTYPES

log = logging.getLogger(__name__)
CONTEXT = 0.7e9  # bytes that a CUDA process takes before its first tensor; ours
FRAGMENTS = 1.03  # what an allocator holds over what is asked of it; ours


def peaks(estimate: Estimate) -> dict[str, float]:
    """Peak bytes by stage: weights, and what the stage holds beside them."""
    held = {name: stage.peak(estimate) for name, stage in estimate.stages.items()}
    return {name: FRAGMENTS * size for name, size in held.items() if size is not None}


def fits(held: float | None, room: float) -> bool:
    """Whether what a stage holds has room in so many bytes of a device."""
    return FRAGMENTS * (held or 0.0) + CONTEXT <= room


def traced(trace: Callable[..., int], *arguments: Any, **settings: Any) -> int:
    """What a traced pass (`memory`) holds; nothing, with a word, where a family cannot run without numbers
    (experts, in some dtypes)."""
    try:
        return trace(*arguments, **settings)
    except (RuntimeError, AttributeError) as error:
        log.warning("memory beyond the weights is not known for this model: %s", str(error).splitlines()[0])
        return 0


def whole(estimate: Estimate) -> Any:
    """The unpruned model on the meta device."""
    return skeleton(estimate.shape, estimate.model["dtype"])


def passing(estimate: Estimate, rows: int, length: int, *, states: bool = False) -> float:
    """What the unpruned model's pass over so many texts of this length holds beyond the weights; with `states` the
    output of every block too."""
    about = ["passing", estimate.model, rows, length, states]
    return once(about, lambda: traced(memory.reading, whole(estimate), rows, length, states=states))


def judging(estimate: Estimate, asked: Judging) -> float:
    """What lm-eval holds beyond the weights over the longest requests: of answers that are compared or, if that is
    more, of those that are written."""
    compared, written = (int(LONGEST * asked.longest(written=each)) for each in (False, True))
    passes = ((_comparing, compared), (_writing, written))
    return max((held(estimate, asked, length) for held, length in passes if length), default=0)


def _comparing(estimate: Estimate, asked: Judging, length: int) -> float:
    """A pass over a batch with all its logits, or over the rows of shared beginnings that are read at once with the
    logits that are there at once: in the model's dtype, and their logarithms in float32."""
    from sddx.evaluation.likelihoods import LOGITS, PASS_TOKENS, ROW_TOKENS

    rows, vocabulary = asked.batch_size, estimate.shape.vocab_size
    if asked.packed:
        length = max(ROW_TOKENS, 2 * length)
        rows = max(PASS_TOKENS // length, 1)
    logits = rows * length * vocabulary
    logits = min(logits, max(LOGITS, vocabulary)) if asked.packed else logits
    return logits * (DTYPES[estimate.model["dtype"]].itemsize + 4) + passing(estimate, rows, length)


def _writing(estimate: Estimate, asked: Judging, length: int) -> float:
    """The cache of a batch whose answers are as long as allowed, and a pass over its prompts with the logits of
    their last tokens."""
    cache = estimate.unpruned.cache_bytes * (length + asked.longest_answer)
    each = cache + 2 * 4 * estimate.shape.vocab_size
    return asked.batch_size * each + passing(estimate, asked.batch_size, length)


def looked_at(estimate: Estimate, others: float = 0.0) -> float:
    """Weights of the unpruned model, and `others`, where nothing is trained; in shards, embeddings and head are
    whole on every device."""
    kept = 2 * estimate.unpruned.head * DTYPES[estimate.model["dtype"]].itemsize if in_shards(estimate) else 0
    return share(estimate, estimate.unpruned.weight_bytes + others - kept) + kept


def in_shards(estimate: Estimate) -> bool:
    """Whether no device holds a model whole."""
    return estimate.config["trainer"].get("strategy") == "fsdp"


def share(estimate: Estimate, held: float) -> float:
    """What a device holds of so many bytes: all, or in shards its share and one block, whole, with the next one on
    its way."""
    if not in_shards(estimate):
        return held
    sizes = estimate.unpruned
    return held / estimate.config["trainer"]["devices"] + 2 * sizes.weight_bytes / sizes.blocks
