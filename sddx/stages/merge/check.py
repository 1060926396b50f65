"""What merging refuses before any work."""

from __future__ import annotations

from sddx.config.build import Settings, build, made, tried, with_defaults
from sddx.errors import UserError
from sddx.run_folder import read_config
from sddx.stages.held_out import require_unseen
from sddx.stages.local_model import Check, LocalModel

# How a student learns.
LEARNING = ("loss", "tuning", "trainer", "selfdata", "teacher", "teacher_cache", "max_length")
SHARED = ("model", "calibration", "pruning")  # what decides base and cut


def of_settings(method: Settings) -> list[Check]:
    """There are students of one cut to merge, whole models that transformers knows, and the method takes them."""
    return [lambda: _check(method)] if method.get("merging") else []


def of_model(method: Settings, model: LocalModel) -> list[Check]:
    """What is given block by block is given for the blocks that stay."""
    if not (merging := method.get("merging")) or method["pruning"].get("units", "blocks") != "blocks":
        return []
    return [lambda: _check_lengths(merging, model.config.num_hidden_layers - method["pruning"]["remove"])]


def _check(method: Settings) -> None:
    from sddx.compression.choose import Pruning

    merging = method["merging"]
    if len(merging["students"]) < 2:
        raise UserError(
            f"merging.students names {len(merging['students'])}. Name two runs or more, by folder or by what "
            "they change here: \"merging.students=['dataset=tiny_arithmetic','dataset=tiny_comparison']\"."
        )
    for name, student in zip(merging["names"], merging["students"], strict=True):
        settings: Settings = student
        if isinstance(student, dict):
            _check_student(name, student, method)
        else:
            settings = _check_finished(student, method)
        _check_held_out(name, settings, method)
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


def _check_held_out(name: str, student: Settings, method: Settings) -> None:
    """A student trains on no prompt that this run measures on. Raises UserError."""
    others = (method.get("speculation") or {}).get("datasets", {})
    measured = {f"speculation.datasets.{each}": node for each, node in others.items()}
    looked = [each for each in ("speculation", "drift") if method.get(each)]
    if looked := [*(["merging.mixed"] if method["merging"]["mixed"] else []), *looked]:
        measured[", ".join(looked)] = method["dataset"]
    for where, node in measured.items():
        require_unseen(f"merging.students: {name!r}", student, where, node, method["validation"])


def _check_finished(folder: str, method: Settings) -> Settings:
    """Its settings, once it holds a student in this run's dtype. Base, cut and patch are compared as soon as these
    are known."""
    from sddx.students.recovered import find_own

    run = find_own(folder)
    if run.trained is None:
        raise UserError(f"merging.students: the run in {folder} trained nothing. Name one with a student.")
    if (dtype := run.summary["dtype"]) != method["model"]["dtype"]:
        raise UserError(
            f"merging.students: the student in {folder} was trained in {dtype}, and this run has "
            f"{method['model']['dtype']}. Merge students of one dtype: model.dtype={dtype}."
        )
    return with_defaults(read_config(run.folder))


def _check_mixed(mixed: bool, name: str, student: Settings | str, method: Settings) -> None:
    """Whose rows are mixed names them, and learns as this run does."""
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
    """It takes so many students, and gives what can stand in their place: tried on small tensors."""
    import torch

    from sddx.merging.files import sound
    from sddx.merging.methods import Place

    for dtype in (torch.float32, torch.bfloat16):
        origin = torch.zeros(2, 2, dtype=dtype)
        students = [torch.ones_like(origin) for _ in range(count)]
        sound(tried("merging.method", build(node), students, origin, Place("tensor")), origin, "a tensor")


def _check_lengths(merging: Settings, left: int) -> None:
    """What is given for each block is given for each that is left, to a method of ours. Raises UserError."""
    method = merging["method"]
    if not str(method["_target_"]).startswith("sddx."):
        return
    given = {"t": method.get("t"), **{f"weights[{n}]": each for n, each in enumerate(method.get("weights") or [])}}
    for name, values in given.items():
        if isinstance(values, list) and len(values) != left:
            raise UserError(
                f"merging.method.{name} holds {len(values)} numbers, and {left} blocks are left. Give one for each "
                "of them, or one number."
            )
