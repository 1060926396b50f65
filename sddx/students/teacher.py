"""The unpruned model as teacher: inside the student's own weights, or as a second copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sddx.compression.compressed import Compressed, Compression
from sddx.errors import UserError
from sddx.models.anatomy import DECODER, INDICES, bare, blocks, head, is_adapted, put
from sddx.models.load import free_memory, frozen_model
from sddx.models.outputs import head_of, run
from sddx.records import Artifact, Batch, Cut, Outputs
from sddx.students.student import load_student

Teacher = Callable[..., Outputs]  # teacher(batch, states=False)


class SharedTeacher:
    """The unpruned model in the student's frozen weights: all blocks in, the adapter off.

    peft is applied after the compression, so no removed part ever has an adapter, and patches stand in blocks of
    the student's own. Removed parts are held here and not in the student's module tree: no state dict, optimiser
    or checkpoint of the student sees them.
    """

    def __init__(self, made: Compressed) -> None:
        """Raises ValueError where the unpruned model is not in the student's weights, or would move with them."""
        student, unpruned = made.model, made.whole.get(DECODER)
        if unpruned is None or not _shares(blocks(student), unpruned.blocks, made.cut):
            raise ValueError("the student's blocks are not the blocks that the cut keeps")
        if not is_adapted(student) and any(weight.requires_grad for weight in student.parameters()):
            # Full fine-tuning would move the teacher, and an adapter put in later would not be switched off.
            raise ValueError("a shared teacher needs frozen weights: apply peft, or use SeparateTeacher")
        self.student, self.made, self.full = student, made, unpruned
        students = set(student.modules())
        for module in unpruned.blocks.modules():
            if module not in students:
                module.training = False
        own = {id(weight) for weight in student.parameters()}
        for weight in unpruned.blocks.parameters():
            if id(weight) not in own:
                weight.requires_grad_(False)

    @property
    def blocks(self) -> nn.ModuleList:
        """All blocks that the teacher runs, those of the student among them."""
        return self.full.blocks

    def to(self, device: torch.device | str) -> SharedTeacher:
        """Move what the student lacks; the rest moves with the student."""
        self.full.blocks.to(device)
        return self

    @contextmanager
    def unpruned(self) -> Iterator[Any]:
        """Inside, the student *is* the unpruned model: the compression undone, adapter off, eval mode. Everything
        is put back on leaving, also by an exception."""
        student = self.student
        modes = [(module, module.training) for module in student.modules()]
        # peft freezes the adapter while it is off, and makes it trainable afterwards whatever it was.
        trainable = [(weight, weight.requires_grad) for weight in student.parameters()]
        try:
            # Done again first: peft switches on again what it finds in the student, adapters in twins too.
            with student.disable_adapter() if is_adapted(student) else nullcontext(), self.made.undone():
                student.eval()
                yield student
        finally:
            for module, training in modes:
                module.training = training
            for weight, wanted in trainable:
                weight.requires_grad_(wanted)

    def __call__(self, batch: Batch, *, states: bool = False) -> Outputs:
        """The unpruned model's outputs, without gradients. The head stays valid after the pass."""
        with torch.no_grad(), self.unpruned():
            outputs = run(self.student, **batch.inputs, states=states)
            projection: Any = head(self.student)
            # An adapter on the head itself hides the frozen projection inside.
            return replace(outputs, head=head_of(self.student, _wrapped(projection) or projection))


def beside(teacher: SharedTeacher) -> Any:
    """The unpruned model as a second model around the student's weights, which runs while the student stays what it
    is: its blocks have numbers of their own, and so memories. The student's adapter is not in it."""
    with teacher.unpruned() as student:
        model = bare(student)
        modules = (m for m in model.modules() if not any(m.children()) and not INDICES & vars(m).keys())
        shared = [*modules, *model.parameters(), *model.buffers()]
        return _without_adapter(deepcopy(model, {id(each): each for each in shared}))


def _without_adapter(model: Any) -> Any:
    """The model with what an adapter wraps in the place of each wrapper: one that is only off still takes time and
    counts as weights."""
    while wrapped := {name: inner for name, each in model.named_modules() if (inner := _wrapped(each))}:
        for name, inner in wrapped.items():
            put(model, name, inner)
    return model


def _wrapped(module: nn.Module) -> Any:
    """What peft put a module of its own around; None in any other module."""
    return getattr(module, "base_layer", getattr(module, "original_module", None))


def both(base: Artifact, done: Sequence[Compression], student: Artifact | None, **loading: str) -> tuple[Any, Any]:
    """The unpruned model, and the pruned one, or where there is a `student` the recovered one: both can run, in one
    set of weights unless the student's are its own."""
    free_memory()
    loaded = load_student(base.path, student.path if student else None, done=done, base=base.key, **loading)
    if not loaded.whole:
        return frozen_model(base.path, **loading), loaded.model
    return beside(SharedTeacher(loaded)), loaded.model


def _shares(student: nn.ModuleList, unpruned: nn.ModuleList, cut: Cut) -> bool:
    """Whether the student has one block for each that is kept, each with weights of that one (a block that lost
    a branch or carries a patch is a twin; one that was retrained to stand for others shares none)."""
    if (len(student), len(unpruned)) != (len(cut.kept), cut.total):
        return False
    shared = 0
    for block, origin in zip(student, (unpruned[number] for number in cut.kept), strict=True):
        weights = {id(weight) for weight in origin.parameters()}
        shared += any(id(weight) in weights for weight in block.parameters())
    return shared >= len(cut.kept) - len(cut.spans)


class SeparateTeacher:
    """A second copy of the unpruned model, frozen; for full fine-tuning, or for another model altogether."""

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False).eval()

    @property
    def blocks(self) -> nn.ModuleList:
        """All blocks that the teacher runs, none of the student's."""
        return blocks(self.model)

    def to(self, device: torch.device | str) -> SeparateTeacher:
        """The teacher itself, its model moved to a device."""
        self.model.to(device)
        return self

    def __call__(self, batch: Batch, *, states: bool = False) -> Outputs:
        """The teacher's outputs, without gradients."""
        with torch.no_grad():
            return run(self.model, **batch.inputs, states=states)


def check_vocabularies(student_config: Any, teacher_config: Any) -> None:
    """Raises UserError where logits cannot be compared: families pad their vocabularies differently."""
    student, teacher = student_config.vocab_size, teacher_config.vocab_size
    if student != teacher:
        raise UserError(
            f"the student's vocabulary has {student} entries and the teacher's {teacher}: their logits "
            f"cannot be compared. Use a teacher with the same tokenizer and the same padded vocabulary."
        )
