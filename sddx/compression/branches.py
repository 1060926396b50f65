"""Blocks that lack a branch or carry something more, made without touching the original."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sddx.models.anatomy import Branch, twin


def without(block: Any, kind: str, branch: Branch) -> Any:
    """A twin of the block that skips one of its branches, norms included: the residual stream passes unchanged."""
    made = twin(block)
    core = getattr(block, branch.core)
    index = next((vars(m)["layer_idx"] for m in core.modules() if "layer_idx" in vars(m)), None)
    setattr(made, branch.core, NoAttention(index) if kind == "attention" else NoFeedForward())
    for name in filter(None, (*branch.others, branch.post)):
        setattr(made, name, nn.Identity())
    return made


class NoAttention(nn.Module):
    """Stands where an attention module stood and adds nothing to the residual stream, or what its `patch` adds.

    It keeps no keys or values, but its layer of the cache goes on counting tokens: transformers takes the
    sequence length from the first layer, and would begin at position 0 again without an error.
    """

    def __init__(self, layer_idx: int | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.patch: nn.Module | None = None

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> tuple[torch.Tensor, None]:
        """The update of the patch, or zeros, and no attention weights; the cache is told how many tokens passed."""
        cache = next(
            (named[name] for name in ("past_key_values", "layer_past") if named.get(name) is not None), None
        )
        if cache is not None and self.layer_idx is not None:
            from sddx.compression.counting import count

            count(cache, self.layer_idx, hidden_states.shape[1])
        return _update(self.patch, hidden_states), None


class NoFeedForward(nn.Module):
    """Stands where the feed-forward branch ended, and adds nothing, or what its `patch` adds. (MPT's own adds
    the residual itself.)"""

    def __init__(self) -> None:
        super().__init__()
        self.patch: nn.Module | None = None

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The update of the patch, or zeros, on top of the `residual` where the family adds it here."""
        update = _update(self.patch, hidden_states)
        return update if residual is None else residual + update


def _update(patch: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states.new_zeros(()) if patch is None else patch.update(hidden_states)
