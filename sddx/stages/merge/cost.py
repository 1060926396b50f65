"""What merging takes: what the runs take whose students it merges, and one more model to evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sddx.estimate.costs import LEARNED, Estimate, Part
from sddx.stages.distill import cost as distill
from sddx.stages.evaluate import cost as evaluate
from sddx.stages.train import cost as train


def parts(estimate: Estimate) -> Iterator[Part]:
    """The students that are merged, trained and evaluated (finished runs take nothing), and what they become."""
    merging = estimate.config.get("merging")
    for settings in merging["students"] if merging else ():
        if isinstance(settings, Mapping):
            student = Estimate({**estimate.config, **settings, "merging": None}, {})
            yield from distill.parts(student)
            yield from train.parts(student)
            yield evaluate.evaluated(student, "recovered", student.pruned, LEARNED)
    if merging:
        yield evaluate.evaluated(estimate, "merged", estimate.pruned, (*LEARNED, "merging"))


def peak(estimate: Estimate) -> float | None:
    """A base model, of which one student after another is made and written down; tensors are merged from files."""
    return estimate.unpruned.weight_bytes if estimate.config.get("merging") else None
