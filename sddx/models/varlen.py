"""Attention within each of several texts that stand in one flat row, without a mask and without padding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sddx.models.anatomy import decoder
from sddx.records import flat_spans

VARLEN = "sddx_varlen"


@contextmanager
def varlen(*models: Any) -> Iterator[None]:
    """In this context models that attend by sdpa do so text by text. Flash attention does as much by itself, and
    eager attention has a mask made for it: both find the texts by their positions, which begin at 0 again."""
    configs = [config for config in (decoder(model).config for model in models) if _attends_by_sdpa(config)]
    for config in configs:
        config._attn_implementation = VARLEN
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"


def _attends_by_sdpa(config: Any) -> bool:
    return config._attn_implementation == "sdpa"


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa for one flat row, [1, heads, time, width] to [1, time, heads, width]: causal within each
    text, those of one length that stand side by side at once. No mask is asked for, since no module registers one
    for this name. Raises ValueError for models that make their own, and for those whose attention does not
    know where texts begin."""
    if attention_mask is not None:
        raise ValueError("the model makes a mask of its own")
    if position_ids is None:
        raise ValueError("attention is not given the positions of tokens")
    shapes = _shapes(position_ids)
    sizes = [count * length for count, length in shapes]
    attended = []
    for shape, *parts in zip(
        shapes, *(states[0].split(sizes, dim=1) for states in (query, key, value)), strict=True
    ):
        q, k, v = (part.unflatten(1, shape).transpose(0, 1) for part in parts)
        mask = _window(shape[1], sliding_window, query.device)
        output, _ = sdpa_attention_forward(module, q, k, v, mask, **named)
        attended.append(output.flatten(0, 1))
    return torch.cat(attended)[None], None


def _shapes(position_ids: Tensor) -> list[tuple[int, int]]:
    """The texts of a flat row in groups of one length, each group as (texts, length)."""
    lengths = (end - begin for begin, end in flat_spans(position_ids))
    return [(len(list(texts)), length) for length, texts in groupby(lengths)]


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """What each token of a text sees where it is longer than the window; None where it sees all before it."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    distance = places[:, None] - places
    return (distance >= 0) & (distance < window)


AttentionInterface.register(VARLEN, varlen_attention)
