"""Take blocks out of a model."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

from sddx.models.anatomy import Stack, decoder, is_adapted, set_blocks, stack
from sddx.records import Cut, UserError


def remove_blocks(model: Any, cut: Cut) -> Stack:
    """Edit the model in place so that only the blocks which the cut keeps are left; no weight changes.

    Depth, every per-layer config list and the layer indices follow. Returns the model's original stack: all
    blocks in their order and the full lists, which a shared teacher needs. Raises UserError where the cut was
    made for another depth, ValueError for a model that already has an adapter.
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
    lists = {name: [values[block] for block in cut.kept] for name, values in full.lists.items()}
    kept = nn.ModuleList(full.blocks[block] for block in cut.kept)
    kept.training = full.blocks.training
    set_blocks(model, Stack(kept, lists))
    return full


def _own_config(model: Any) -> None:
    """Give the model a config of its own: another model built from the same object must keep its depth."""
    shared = decoder(model).config
    own = deepcopy(shared)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own
