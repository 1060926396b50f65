"""Weights in the order in which the CPU's matrix product reads them, put there once and not for each product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sddx.models.anatomy import bare
from sddx.models.load import has_bfloat16

# For how many rows the order is chosen (any number may be read), and the bytes that the copies may take.
ROWS, ROOM = 64, 4 << 30


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """In this context the linear layers of a model in bfloat16 on the CPU read packed copies of their weights, as
    many as ROOM has room for: a product of few rows spends up to half its time on putting them in order. Without
    gradients. Elsewhere nothing is done."""
    layers: list[nn.Module] = []
    used = 0
    try:
        for layer in bare(model).modules() if _is_known() else ():
            if _is_packable(layer) and used + layer.weight.nbytes <= ROOM:
                weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
                layer.forward = partial(_linear, weight, layer.bias)
                layers.append(layer)
                used += layer.weight.nbytes
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward")


def _is_known() -> bool:
    """Whether this torch has the two operations, which its compiler uses, for numbers of this kind."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return has_bfloat16() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _is_packable(layer: Any) -> bool:
    """A plain linear layer, whose forward nobody has put another in the place of."""
    if type(layer) is not nn.Linear or "forward" in vars(layer) or type(layer.weight) is not nn.Parameter:
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.bfloat16


def _linear(weight: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
