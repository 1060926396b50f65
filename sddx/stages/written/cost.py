"""What looking at the answers of the unpruned model takes."""

from __future__ import annotations

from collections.abc import Iterator

from sddx.estimate import peaks
from sddx.estimate.costs import Estimate, Part
from sddx.estimate.efforts import Effort
from sddx.estimate.skeleton import Size
from sddx.models.load import DTYPES
from sddx.stages.written.run import ROWS, SAMPLE

NAMED = ("dataset", "validation", "generation", "selfdata", "max_length", "pruning", "calibration")
CHUNK = 512  # tokens that the head is applied to at once (evaluation.text.held_out)


def parts(estimate: Estimate) -> Iterator[Part]:
    """What the unpruned and the pruned model read of some rows, where there are answers."""
    if estimate.rewrites:
        about = [estimate.config["loss"]["data"], [estimate.config[name] for name in NAMED]]
        for number, size in enumerate((estimate.unpruned, estimate.pruned)):
            yield estimate.part("written", [*about, number], size, _effort(estimate, size))


def peak(estimate: Estimate) -> float | None:
    """Weights, a pass over the longest rows, and a chunk of logits, in float32 too with their logarithms."""
    if not estimate.rewrites:
        return None
    logits = CHUNK * estimate.shape.vocab_size * (DTYPES[estimate.model["dtype"]].itemsize + 2 * 4)
    return peaks.looked_at(estimate) + peaks.passing(estimate, ROWS, estimate.config["max_length"]) + logits


def _effort(estimate: Estimate, size: Size) -> Effort:
    """Rows behind their references and behind the answers, with the head on both, but not on prompts."""
    rows, most = min(SAMPLE, estimate.rows.count), estimate.config["max_length"]
    effort = Effort()
    for answer in (estimate.rows.answer, estimate.answer):
        length = min(estimate.rows.prompt + answer, most)
        reading = rows * (length * size.body(length) + min(answer, length) * 2 * size.head)
        effort += Effort(reading=reading, read=rows * length)
    return effort
