"""What fitting a patch takes."""

from __future__ import annotations

from collections.abc import Iterator

from sddx.compression.fit import UNEXPLAINED
from sddx.compression.junction import gaps
from sddx.compression.patches import Linear
from sddx.config.build import build
from sddx.data.encode import TEXT_BATCH
from sddx.estimate import memory, peaks
from sddx.estimate.costs import Estimate, Part
from sddx.estimate.efforts import Effort
from sddx.estimate.skeleton import removed, skeleton
from sddx.models.anatomy import blocks
from sddx.records import Units


def parts(estimate: Estimate) -> Iterator[Part]:
    """One fit, where anything stands in for what is removed."""
    if estimate.fit is not None:
        about = [estimate.config["pruning"], estimate.config["calibration"]]
        yield estimate.part("patch", about, estimate.unpruned, _effort(estimate))


def peak(estimate: Estimate) -> float | None:
    """Weights, and the states of a batch at every block or, if that is more, a retrained block in float32 with its
    moments while it learns from the batch; the sums of a regression in float64."""
    if estimate.fit is None:
        return None
    batch, longest = estimate.calibration.side_by_side, estimate.calibration.longest
    passing = peaks.passing(estimate, batch, longest, states=True)
    if estimate.fit.reads == "preceding":
        block = skeleton(estimate.shape, "float32")
        removed(block, "blocks", estimate.unpruned.blocks - 1)
        weights = sum(w.numel() * w.element_size() for w in blocks(block).requires_grad_(True).parameters())
        learning = peaks.traced(memory.learning, block, batch, longest, checkpointing=False)
        passing = max(passing, 3 * weights + learning)
    width = estimate.shape.hidden_size
    sums = 2 * 8 * width**2 * junctions(estimate) if isinstance(estimate.fit, Linear) else 0
    return peaks.looked_at(estimate) + passing + sums


def junctions(estimate: Estimate) -> int:
    """Junctions at which a patch stands, by the cut that the rule makes of scores whose least do not lie side by
    side; where it reads others than one score a unit, the most there can be."""
    pruning, units = estimate.config["pruning"], Units(estimate.units, estimate.unpruned.blocks)
    scores = {"mean": [float(unit % 2) for unit in range(len(units))]}
    try:
        return len(gaps(units.cut(build(pruning["choose"])(scores, len(units), pruning["remove"]))))
    except Exception:  # of whatever kind a user's rule raises over scores that it does not know
        return pruning["remove"]


def _effort(estimate: Estimate) -> Effort:
    """One pass over all texts, another over the first batches to see what is left unexplained, and for a patch that
    is trained one an epoch for each gap, beside which a retrained block is run and learns."""
    texts, size, fit = estimate.calibration, estimate.unpruned, estimate.fit
    epochs = fit.epochs * junctions(estimate)
    read = (1 + epochs) * texts.count + min(UNEXPLAINED * TEXT_BATCH, texts.count)
    each = texts.padded * size.body(texts.padded)
    learned = epochs * texts.count if fit.reads == "preceding" else 0
    return Effort(reading=read * each, learning=3 * learned * each / size.blocks, read=read * texts.mean)
