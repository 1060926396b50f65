"""What merging takes: the trainings of the students that it merges, and one more model to evaluate for each and for
what they become. The merge itself reads and writes files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sddx.estimate.costs import Estimate, Part
from sddx.stages.distill import cost as distill
from sddx.stages.evaluate import cost as evaluate
from sddx.stages.train import cost as train


def parts(estimate: Estimate) -> Iterator[Part]:
    """Those of the runs whose students are merged; finished ones take nothing."""
    merging = estimate.config.get("merging") or {"students": ()}
    for settings in merging["students"]:
        if isinstance(settings, Mapping):
            other = estimate.varied(**settings)
            yield from distill.parts(other)
            yield from train.parts(other)
            yield from evaluate.recovered(other)
    if merging["students"]:
        yield evaluate.part(estimate, "merged", estimate.pruned, merging)
