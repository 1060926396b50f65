"""What capturing a teacher takes."""

from __future__ import annotations

from collections.abc import Iterator

from sddx.data.encode import TEXT_BATCH, text_spans
from sddx.estimate import peaks
from sddx.estimate.costs import Estimate, Part
from sddx.estimate.efforts import Effort
from sddx.models.load import DTYPES
from sddx.training.coarse import CHUNK


def parts(estimate: Estimate) -> Iterator[Part]:
    """One pass over all rows, whatever is trained on them."""
    if not estimate.config["teacher_cache"]:
        return
    config, size, length = estimate.config, estimate.teacher, _length(estimate)
    own = ("generation", "selfdata") if estimate.rewrites else ()
    named = ("dataset", "validation", "max_length", "teacher", "teacher_cache", *own)
    rows, labels = config["validation"] + estimate.rows.count, min(estimate.answer, length)
    reading = rows * (length * size.body(length) + 2 * labels * size.head)
    about = [config["loss"]["data"], [config[name] for name in named]]
    yield estimate.part("capture", about, size, Effort(reading=reading, read=rows * length))


def peak(estimate: Estimate) -> float | None:
    """Weights, a pass over the longest rows that are read at once, and a chunk of logits, with their logarithms and
    those of all but the likeliest, and exponentials, in float32."""
    if not estimate.config["teacher_cache"]:
        return None
    longest = estimate.config["max_length"]
    side_by_side = text_spans([longest] * TEXT_BATCH)[0][1]
    logits = CHUNK * estimate.shape.vocab_size * (DTYPES[estimate.model["dtype"]].itemsize + 3 * 4)
    weights = peaks.looked_at(estimate, estimate.teacher.weight_bytes - estimate.unpruned.weight_bytes)
    return weights + peaks.passing(estimate, side_by_side, longest) + logits


def _length(estimate: Estimate) -> float:
    """Tokens of a row."""
    return min(estimate.rows.prompt + estimate.answer, estimate.config["max_length"])
