"""What merging takes: what the runs take whose students it merges, and one more model to evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sddx.estimate.costs import LEARNED, Estimate, Part
from sddx.stages.capture import cost as capture
from sddx.stages.distill import cost as distill
from sddx.stages.evaluate import cost as evaluate
from sddx.stages.train import cost as train


def parts(estimate: Estimate) -> Iterator[Part]:
    """The students that are merged, trained and evaluated (finished runs take nothing), one of all their rows where
    that is asked for, and what they become."""
    if not (merging := estimate.config.get("merging")):
        return
    settings = [each for each in merging["students"] if isinstance(each, Mapping)]
    students = [Estimate({**estimate.config, **each, "merging": None}, {}) for each in settings]
    for student in students:
        yield from distill.parts(student)
        yield from capture.parts(student)
        yield from train.parts(student)
        yield evaluate.evaluated(student, "recovered", student.pruned, LEARNED)
    if merging["mixed"]:
        yield train.of_all(estimate, students)
        yield evaluate.evaluated(estimate, "mixed", estimate.pruned, (*LEARNED, "merging"))
    yield evaluate.evaluated(estimate, "merged", estimate.pruned, (*LEARNED, "merging"))


def peak(estimate: Estimate) -> float | None:
    """A base model, of which one student after another is made and written down; tensors are merged from files."""
    return estimate.unpruned.weight_bytes if estimate.config.get("merging") else None
