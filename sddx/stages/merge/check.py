"""What merging refuses before any work."""

from __future__ import annotations

from typing import Any

from sddx.config.build import Settings, build, made, tried
from sddx.errors import UserError
from sddx.stages.local_model import Check

LEARNING = ("loss", "tuning", "trainer", "selfdata", "teacher", "max_length")  # how a student learns
SHARED = ("model", "calibration", "pruning")  # what decides base and cut


def of_settings(method: Settings) -> list[Check]:
    """There are students of one cut to merge, whole models that transformers knows, and the method takes them."""
    return [lambda: _check(method)] if method.get("merging") else []


def _check(method: Settings) -> None:
    from sddx.compression.choose import Pruning

    merging = method["merging"]
    if len(merging["students"]) < 2:
        raise UserError(
            f"merging.students names {len(merging['students'])}. Name two runs or more, by folder or by what "
            "they change here: \"merging.students=['dataset=tiny_arithmetic','dataset=tiny_comparison']\"."
        )
    for name, student in zip(merging["names"], merging["students"], strict=True):
        if isinstance(student, dict):
            _check_student(name, student, method)
        _check_mixed(merging["mixed"], name, student, method)
    if not made(method["pruning"], Pruning, "pruning").is_stock:
        raise UserError(
            "Merged students are written as plain models, which one without branches or with a patch of its own is "
            "not. Use pruning.units=blocks, and no patch or pruning.patch.fold=true."
        )
    _check_method(merging["method"], len(merging["students"]))


def _check_student(name: str, student: Settings, method: Settings) -> None:
    if other := [group for group in SHARED if student[group] != method[group]]:
        raise UserError(
            f"merging.students: {name!r} changes {', '.join(other)}. Only students of one base model and one cut "
            "can be merged."
        )
    if not student["loss"]["terms"]:
        raise UserError(f"merging.students: {name!r} trains nothing. Give it a loss with terms.")


def _check_mixed(mixed: bool, name: str, student: Settings | str, method: Settings) -> None:
    """Whose rows are mixed names them, and learns as this run does."""
    if mixed not in (True, False):
        raise UserError(f"merging.mixed={mixed!r} must be true or false.")
    if not mixed:
        return
    if isinstance(student, str):
        raise UserError(
            f"merging.mixed=true learns from the rows of all students, and {name} is a finished run's folder. Name "
            "this student by what it changes here: 'dataset=...'."
        )
    if other := [group for group in LEARNING if student[group] != method[group]]:
        raise UserError(
            f"merging.mixed=true: {name!r} changes {', '.join(other)}, and one student cannot learn in two ways. "
            "Let students differ in dataset and seed alone, or leave merging.mixed out."
        )


def _check_method(node: Settings, count: int) -> None:
    """It takes so many students; tried on small tensors. Raises UserError."""
    import torch

    from sddx.merging.methods import Place

    tensors: list[Any] = [torch.ones(2, 2) for _ in range(count)]
    tried("merging.method", build(node), tensors, torch.zeros(2, 2), Place("tensor"))
