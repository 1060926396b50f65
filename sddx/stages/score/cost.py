"""What scoring takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sddx.config.build import build
from sddx.estimate import memory, peaks
from sddx.estimate.costs import Estimate, Part
from sddx.estimate.efforts import Effort
from sddx.importance.score import Work, works
from sddx.models.anatomy import decoder
from sddx.records import Units
from sddx.stages.score.asked import scored_by


def parts(estimate: Estimate) -> Iterator[Part]:
    """One pass over the texts, or more, for all metrics that are asked for."""
    if metrics := _asked(estimate):
        about = [list(metrics.values()), estimate.units, estimate.config["calibration"]]
        yield estimate.part("score", about, estimate.unpruned, _effort(estimate))


def peak(estimate: Estimate) -> float | None:
    """Weights, and the states of a batch at every block, its texts as long as they are; for gradients, those of all
    weights of the blocks and a pass over one text; for tasks, a pass of lm-eval."""
    held = [_measuring(estimate, *each) for each in _scored(estimate)]
    return peaks.looked_at(estimate) + max(held) if held else None


def _asked(estimate: Estimate) -> dict[str, Any]:
    return scored_by(estimate.config, alone=bool(estimate.config["stages"]))


def _scored(estimate: Estimate) -> list[tuple[Any, Work]]:
    """Each metric with what it runs; None stands for all functions of states, which share a pass."""
    metrics = {name: build(node) for name, node in _asked(estimate).items()}
    if not metrics:
        return []
    by_metric = works(metrics, Units(estimate.units, estimate.unpruned.blocks), estimate.calibration.count)
    return [(metrics.get(name), work) for name, work in by_metric.items()]


def _effort(estimate: Estimate) -> Effort:
    """All metrics that are asked for. A backward pass is twice a forward one."""
    texts, size, total = estimate.calibration, estimate.unpruned, Effort()
    for metric, work in _scored(estimate):
        length = texts.mean if work.alone else texts.padded
        total += Effort(
            reading=length * work.body * size.body(length) + texts.mean * work.head * 2 * size.head,
            learning=3 * length * work.learned * (size.body(length) + 2 * size.head),
            read=texts.mean * (work.body + work.learned),
        )
        if work.models:
            total += estimate.judging(vars(metric.value)).effort(size) * work.models
    return total


def _measuring(estimate: Estimate, metric: Any, work: Work) -> float:
    longest, batch = estimate.calibration.longest, estimate.calibration.side_by_side
    if work.models:
        return peaks.judging(estimate, estimate.judging(vars(metric.value)))
    if work.learned:
        model = peaks.whole(estimate)
        decoder(model).requires_grad_(True)
        return peaks.traced(memory.learning, model, 1, longest, checkpointing=False)
    return peaks.passing(estimate, 1 if work.alone else batch, longest, states=True)
