"""Layers of a cache that count tokens and hold none."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class _Counting:
    """What makes a cache layer one that counts tokens and holds none. Its batch has no rows to rearrange."""

    count = 0

    def update(self, *arguments: Any, **named: Any) -> Any:
        raise RuntimeError("a block without attention was given keys to remember")

    def get_seq_length(self) -> int:
        return self.count

    def reset(self) -> None:
        self.count = self.cumulative_length = 0

    def crop(self, tokens: int) -> None:
        self.count = self.count + tokens if tokens <= 0 else min(self.count, tokens)
        self.cumulative_length = self.count

    def reorder_cache(self, beam_idx: torch.Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...


class _Counted(_Counting, DynamicLayer):
    pass


class _CountedWindow(_Counting, DynamicSlidingWindowLayer):
    pass


def count(cache: Any, layer: int, tokens: int) -> None:
    """Let a layer of the cache know that so many tokens more were seen."""
    while len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    present: CacheLayerMixin = cache.layers[layer]
    if not isinstance(present, _Counting):
        window = getattr(present, "sliding_window", None)
        present = _Counted() if window is None else _CountedWindow(sliding_window=window)
        cache.layers[layer] = present
    present.count += tokens
    present.cumulative_length = present.count
