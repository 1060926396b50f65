"""What is done to a model: one thing after another, each of which can be undone, kept and put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from sddx.models.anatomy import Stack, blocks, put_stacks, stacks
from sddx.records import Cut


class Compression:
    """One thing that is done to a model. A kind of it overrides what it needs; blocks are the models' own
    (`Compressed.whole` keeps them), so that only what a kind changes inside them is its own to undo."""

    @property
    def is_stock(self) -> bool:
        """Whether transformers itself can build what is left."""
        return True

    def apply(self, made: Compressed) -> None:
        """Edit the model in place, and note in `made` which blocks are left and which weights were brought in."""
        raise NotImplementedError

    def undone(self, made: Compressed) -> AbstractContextManager[None]:
        """Inside, what was changed in blocks that the unpruned model has too is as it was."""
        return nullcontext()

    def thaw(self, made: Compressed) -> None:
        """Let that learn which goes on learning with a student, and freeze all else that was brought in."""

    def after_step(self, made: Compressed) -> None:
        """Make true again what a step of the optimiser may have broken."""

    def keep(self, made: Compressed, folder: Path) -> None:
        """Write what belongs to a student beside its weights."""

    def restore(self, made: Compressed, folder: Path) -> None:
        """Put back what `keep` wrote and `apply` cannot know: what went on learning."""


@dataclass
class Compressed:
    """A model and what was `done` to it, in order.

    `cut` says which of its blocks are left. `whole` are its stacks of blocks as they were, by name, which with the
    model's own weights are the unpruned model; empty where its weights are its own, or cannot be shared in shards.
    `own` are weights that were brought in, by name.
    """

    model: Any
    cut: Cut
    done: tuple[Compression, ...] = ()
    whole: dict[str, Stack] = field(default_factory=dict)
    own: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def is_stock(self) -> bool:
        """Whether the model is one that transformers itself can build."""
        return all(each.is_stock for each in self.done)

    @property
    def has_twins(self) -> bool:
        """Whether a block of the model is a twin of the unpruned model's, with a branch less or a patch more: the
        two cannot share their shards."""
        whole = {block for stack in self.whole.values() for block in stack.blocks}
        return not set(blocks(self.model)) <= whole

    def thaw(self) -> None:
        """Let that learn which goes on learning with a student."""
        for each in self.done:
            each.thaw(self)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Inside, the model is the unpruned one: its blocks, depth, per-layer lists and layer indices are those
        of before, together. Everything is put back on leaving, also by an exception."""
        present = stacks(self.model)
        with ExitStack() as back:
            for each in reversed(self.done):
                back.enter_context(each.undone(self))
            try:
                put_stacks(self.model, self.whole)
                yield
            finally:
                put_stacks(self.model, present)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, every step of whatever optimiser is followed by each kind's `after_step`."""

        def after(optimizer: Optimizer, *arguments: Any) -> None:
            for each in self.done:
                each.after_step(self)

        handle = register_optimizer_step_post_hook(after)
        try:
            yield
        finally:
            handle.remove()


def compress(model: Any, done: Iterable[Compression]) -> Compressed:
    """Do one thing after another to a model, in place. Raises UserError where one does not go with the model."""
    whole = stacks(model)
    made = Compressed(model, Cut.without(set(), len(blocks(model))), whole=whole)
    for each in done:
        each.apply(made)
        made.done += (each,)
    return made
