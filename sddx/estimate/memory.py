"""How much memory a pass takes beyond the weights: the model's own code is run on the meta device, and what would
be allocated and freed is added up."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sddx.models.anatomy import bare, decoder
from sddx.models.outputs import block_states


class Allocations(TorchDispatchMode):
    """Inside: `now` and `peak` are the bytes of all tensors made there and still alive. Views and the weights of
    `model` count as nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {w.untyped_storage()._cdata: w for w in model.parameters()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: Any) -> None:
        if storage._cdata not in self._known:
            size = storage.nbytes()
            self._known[storage._cdata] = weakref.finalize(storage, self._free, storage._cdata, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _free(self, place: int, size: int) -> None:
        self.now -= size
        del self._known[place]


def reading(model: Any, rows: int, length: int, *, states: bool = False) -> int:
    """Peak bytes of a forward pass through the body without gradients, weights apart; `states` keeps the output of
    every block, as scoring does."""
    context: AbstractContextManager = block_states(model) if states else nullcontext()
    with torch.no_grad(), context, Allocations(model) as seen:
        _body(model, rows, length)
    return seen.peak


def learning(model: Any, rows: int, length: int, *, checkpointing: bool) -> int:
    """Peak bytes of a forward and backward pass through the body, weights and gradients of weights apart from what
    the pass itself makes. With `checkpointing` a block's inner states are computed again in the backward pass.
    Automatic mixed precision, which makes copies in half precision, is not traced: states count as they are."""
    model.train()
    if checkpointing:
        bare(model).gradient_checkpointing_enable({"use_reentrant": False})
    with Allocations(model) as seen:
        _body(model, rows, length).sum().backward()
    return seen.peak


def _body(model: Any, rows: int, length: int) -> torch.Tensor:
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    places = torch.arange(length, device="meta")[None]
    # Of four dimensions: a smaller mask would be looked into, and on this device there is nothing to see.
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="meta")
    return decoder(model)(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)[0]
