"""Take blocks and branches out of a model."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sddx.compression.branches import without
from sddx.compression.compressed import Compressed, Compression
from sddx.errors import UserError
from sddx.models.anatomy import Stack, blocks, branches, is_adapted, set_blocks, stack
from sddx.records import CUT_FILE, Cut


@dataclass(frozen=True)
class Removal(Compression):
    """Blocks and branches are taken out, as a cut says."""

    cut: Cut

    @classmethod
    def load(cls, folder: Path) -> Removal:
        """That of the cut in a folder."""
        return cls(Cut.load(folder / CUT_FILE))

    @property
    def is_stock(self) -> bool:
        """Whether whole blocks alone are gone."""
        return not (self.cut.no_attention or self.cut.no_feedforward)

    def apply(self, made: Compressed) -> None:
        """Raises UserError where the cut was made for another depth."""
        apply_cut(made.model, self.cut)
        made.cut = self.cut


def cut_of(done: Iterable[Compression]) -> Cut:
    """The cut among what is done to a model; of one that loses nothing it keeps all."""
    return next(each.cut for each in done if isinstance(each, Removal))


def apply_cut(model: Any, cut: Cut) -> Stack:
    """Edit the model in place so that only what the cut keeps is left; no weight changes.

    Depth, the settings that list or number blocks, and the layer indices follow. A block that loses a branch is
    replaced by a twin that shares the rest of its weights. Returns the model's original stack: all blocks in their
    order, whole, with their settings, which a shared teacher needs. Raises UserError where the cut was made for
    another depth, ValueError for a model that already has an adapter.
    """
    if is_adapted(model):
        raise ValueError("remove blocks first and apply peft afterwards, or the adapter is cut as well")
    full = stack(model)
    if len(full.blocks) != cut.total:
        raise UserError(
            f"the cut was made for a model of {cut.total} blocks, and this one has {len(full.blocks)}. "
            f"Choose the cut from scores of this model."
        )
    _own_config(model)
    student = nn.ModuleList(kept_blocks(model, cut))
    student.training = full.blocks.training
    set_blocks(model, Stack(student, full.only(cut.kept)))
    return full


def kept_blocks(model: Any, cut: Cut) -> list[nn.Module]:
    """The blocks of a whole model that the cut keeps; a twin of each that loses a branch."""
    kept = [blocks(model)[block] for block in cut.kept]
    for kind, lost in (("attention", cut.no_attention), ("feedforward", cut.no_feedforward)):
        for block in lost:
            place = cut.kept.index(block)
            kept[place] = without(kept[place], kind, branches(model)[kind])
    return kept


def _own_config(model: Any) -> None:
    """Give the model a config of its own, with those inside it: another model built from the same object must keep
    its depth."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        if "config" in vars(module):
            module.config = deepcopy(module.config, copies)
