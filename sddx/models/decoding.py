"""Writing by continuous batching: a row that has ended leaves the batch, and a waiting one comes in.

Rows share one time axis: all of them end at its newest column, and a mask hides what stands before a row's first
token. So one column is written for all rows at once, into memory that is taken once, and a row that comes in is
copied to where it would have stood. Keys and values are kept as the model computes them, with one head for a group
of queries, and attended so.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sddx.errors import UserError
from sddx.models.anatomy import bare, decoder, vocabulary
from sddx.models.outputs import head_of
from sddx.models.packing import packed

_log = logging.getLogger(__name__)

GROUPED = "sddx_grouped"
# What one pass over prompts may read, in padded tokens, and the share of padding in it.
PROMPT_TOKENS, PADDING = 2048, 0.1
# The share of a batch that must be free before rows come in: a pass over few tokens reads all weights too.
REFILL = 0.125

Pick = Callable[[Sequence[int], Sequence[int], Tensor], Tensor]
Progress = Callable[[int], object]  # is told how many rows have ended


def write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pick: Pick,
    progress: Progress = lambda rows: None,
    *,
    max_new_tokens: int | Sequence[int],
    batch_size: int,
    ends: Sequence[int],
) -> list[list[int]]:
    """The tokens that the model puts after each prompt, in the order of the prompts: up to the first of `ends`, and
    at most `max_new_tokens`, which may be a number for each prompt.

    `pick(rows, places, logits)` chooses the next token of each row, [rows], from its float32 logits, [rows,
    vocabulary]; `rows` are the numbers of the prompts and `places` how many tokens each has been given. `progress`
    is told how many rows have ended. For models of which `is_batchable` holds; they are left as they are.
    """
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    written: list[list[int]] = [[] for _ in prompts]
    waiting = deque(sorted(range(len(prompts)), key=lambda row: -len(prompts[row])))
    rows: list[int] = []  # of the batch, in its order
    head, columns = head_of(model), max(map(len, prompts), default=0) + 2 * max(most, default=0)
    with torch.no_grad(), packed(model), grouped(model):
        batch = ContinuousBatch(model, min(batch_size, len(prompts)), columns, _shared(prompts))
        while waiting or rows:
            free = batch_size - len(rows)
            if waiting and (not rows or free >= REFILL * batch_size):
                new = _alike(waiting, prompts, free, len(batch.prefix))
                hidden = batch.admit([prompts[row] for row in new])
                rows += new
            else:
                new, hidden = rows, batch.step([written[row][-1] for row in rows])
            chosen = pick(new, [len(written[row]) for row in new], head(hidden).float())
            for row, token in zip(new, chosen.tolist(), strict=True):
                written[row].append(token)
            texts = [(written[row], most[row]) for row in rows]
            over = [n for n, (text, longest) in enumerate(texts) if len(text) == longest or text[-1] in ends]
            for place in reversed(over):
                batch.drop(place)
                rows[place] = rows[-1]
                rows.pop()
            if over:
                progress(len(over))
    return written


def greedy(rows: Sequence[int], places: Sequence[int], logits: Tensor) -> Tensor:
    """The likeliest token of each row."""
    return logits.argmax(-1)


def is_batchable(model: Any, longest: int) -> bool:
    """Whether `write` holds for this model and texts of at most so many tokens: it `remembers_all` of them, and it
    is proven, on two short rows, that it reads positions and masks as they are given."""
    return remembers_all(model, longest) and holds(model, _side_by_side)


def remembers_all(model: Any, longest: int) -> bool:
    """Whether each block of a model attends to the whole of a text of so many tokens, and nothing but keys and
    values is remembered; in one piece on one device, by attention that takes a mask."""
    if getattr(bare(model), "_is_stateful", False):
        return False
    try:
        body = decoder(model)
    except UserError:
        return False
    if any(isinstance(weight, DTensor) for weight in body.parameters()):  # in shards of several processes
        return False
    plain = all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > longest)
        for layer in DynamicCache(config=body.config).layers
    )
    here = len({weight.device for weight in body.parameters()}) == 1
    return plain and here and body.config._attn_implementation in ("sdpa", "eager")


def holds(model: Any, proof: Callable[[Any], tuple[Tensor, Tensor]]) -> bool:
    """Whether the states that a proof finds are those it expects, to the rounding of their dtype."""
    message = "rows of a %s are read alone: %s"
    try:
        with torch.no_grad():
            states, expected = proof(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each family has its own way of refusing a cache or a mask
        _log.info(message, type(bare(model)).__name__, error)
        return False
    apart = float((states - expected).float().norm() / expected.float().norm())
    if not (sound := apart <= torch.finfo(expected.dtype).eps ** 0.5):
        _log.info(message, type(bare(model)).__name__, f"side by side their states differ by {apart:.2g}")
    return sound


def _side_by_side(model: Any) -> tuple[Tensor, Tensor]:
    """The states of two rows that go on together, and those that each has when it is read at once, alone."""
    first, second, last = ([token % vocabulary(model) for token in row] for row in ([1, 2, 3, 4], [1, 5], [6]))
    body = decoder(model)
    with grouped(model):
        batch = ContinuousBatch(model, 2, 6, first[:1])
        states = torch.stack([batch.admit([first, second]), batch.step(last * 2)], dim=1)
    rows = [torch.tensor([row + last], device=states.device) for row in (first, second)]
    return states, torch.cat([body(input_ids=row, use_cache=False).last_hidden_state[:, -2:] for row in rows])


class ContinuousBatch:
    """Rows of different lengths that go on together, one token at a time, in room for `rows` rows and `columns`
    columns. `prefix` are tokens with which each of them begins: they are read once."""

    def __init__(self, model: Any, rows: int, columns: int, prefix: Sequence[int] = ()) -> None:
        self.body, self.prefix = decoder(model), list(prefix)
        self.device = next(self.body.parameters()).device
        self.window = _Window(rows, columns)
        self.cache = Cache(layer_class_to_replicate=partial(_Block, self.window))
        self.before = DynamicCache(config=self.body.config)
        if prefix:
            self._read([self.prefix], self.before)

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts, which are the last rows then: the final hidden state at the end of each, [rows, width]."""
        own = [list(prompt[len(self.prefix) :]) for prompt in prompts]
        past = deepcopy(self.before)
        past.batch_repeat_interleave(len(own))
        hidden = self._read(own, past)
        if (longest := max(map(len, prompts))) > self.window.end:
            self._move(longest)
        self._copy(past, [len(prompt) for prompt in prompts])
        return hidden[torch.arange(len(own)), [len(row) - 1 for row in own]]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Put one token after each row: the final hidden state there, [rows, width]."""
        window = self.window
        if window.end == window.columns:
            self._move(0)
        positions = torch.tensor(window.lengths, device=self.device)[:, None]
        window.grow()
        return self.body(
            input_ids=torch.tensor(tokens, device=self.device)[:, None],
            position_ids=positions,
            attention_mask=self._mask(positions),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    def drop(self, row: int) -> None:
        """Let go of a row; the last one takes its place."""
        window, last = self.window, len(self.window.lengths) - 1
        if row != last:
            columns = slice(window.end - window.lengths[last], window.end)
            for memory in self._memories():
                memory[row, :, columns] = memory[last, :, columns]
            window.lengths[row] = window.lengths[last]
        window.lengths.pop()

    def _read(self, rows: Sequence[Sequence[int]], past: Cache) -> Tensor:
        """The final hidden states of what follows on the past, padded on the right, where nothing looks at it."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)
        return self.body(input_ids=ids, past_key_values=past, use_cache=True).last_hidden_state

    def _mask(self, positions: Tensor) -> Tensor:
        """What each row attends to, [rows, 1, 1, columns], in the form that the model's attention takes."""
        width = self.window.end - self.window.start
        seen = torch.arange(width - 1, -1, -1, device=self.device) <= positions
        return attention_mask(self.body, seen[:, None, None])

    def _copy(self, past: Cache, lengths: Sequence[int]) -> None:
        """Take over the keys and values of new rows. A block without attention has none."""
        window, first = self.window, len(self.window.lengths)
        for number, theirs in enumerate(past.layers):
            if len(self.cache.layers) == number:
                self.cache.layers.append(_Block(window))
            if theirs.keys is None:
                continue
            mine: Any = self.cache.layers[number]
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)
            for row, length in enumerate(lengths):
                columns = slice(window.end - length, window.end)
                mine.keys[first + row, :, columns] = theirs.keys[row, :, :length]
                mine.values[first + row, :, columns] = theirs.values[row, :, :length]
        window.lengths.extend(lengths)

    def _move(self, end: int) -> None:
        """Bring what is remembered to the beginning of the memory, or to end at a later column."""
        window = self.window
        width, rows = window.end - window.start, len(window.lengths)
        end = max(end, width)
        for memory in self._memories() if rows else ():
            memory[:rows, :, end - width : end] = memory[:rows, :, window.start : window.end].clone()
        window.end = end

    def _memories(self) -> Iterator[Tensor]:
        for layer in self.cache.layers:
            if layer.keys is not None and layer.values is not None:
                yield from (layer.keys, layer.values)


@dataclass
class _Window:
    """The part of a memory of so many rows and columns that is in use: a row for each length, whose tokens stand
    before column `end`."""

    rows: int
    columns: int
    end: int = 0
    lengths: list[int] = field(default_factory=list)

    @property
    def start(self) -> int:
        return self.end - max(self.lengths, default=0)

    def grow(self) -> None:
        self.lengths = [length + 1 for length in self.lengths]
        self.end += 1


class _Block(CacheLayerMixin):
    """Keys and values of one block, [rows, heads, columns, width], in memory that is taken once."""

    is_sliding = False

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, since what a mask hides is multiplied by zero and must be a number.
        shape = self.window.rows, key_states.shape[1]
        columns, width = self.window.columns, key_states.shape[3]
        self.values = value_states.new_zeros(*shape, columns, value_states.shape[3])
        if key_states.device.type == "cpu":  # in the order in which a product with queries reads them
            self.keys = key_states.new_zeros(*shape, width, columns).mT
        else:
            self.keys = key_states.new_zeros(*shape, columns, width)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the newest column of each row, and hand out all columns in use."""
        assert self.keys is not None and self.values is not None
        window, rows = self.window, len(self.window.lengths)
        self.keys[:rows, :, window.end - 1 : window.end] = key_states
        self.values[:rows, :, window.end - 1 : window.end] = value_states
        used = slice(window.start, window.end)
        return self.keys[:rows, :, used], self.values[:rows, :, used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return self.window.end - self.window.start

    def get_max_length(self) -> int:
        return self.window.columns


def _shared(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all prompts begin, but for the last one of the shortest, whose state is asked for."""
    if len(prompts) < 2:
        return []
    return list(os.path.commonprefix([list(prompt[:-1]) for prompt in prompts]))


def _alike(waiting: deque[int], prompts: Sequence[Sequence[int]], most: int, prefix: int) -> list[int]:
    """Take the next rows, at most so many, whose prompts are read together without much padding."""
    taken = [waiting.popleft()]
    longest = tokens = len(prompts[taken[0]]) - prefix
    while waiting and len(taken) < most:
        tokens += len(prompts[waiting[0]]) - prefix
        padded = longest * (len(taken) + 1)
        if padded > PROMPT_TOKENS or tokens < (1 - PADDING) * padded:
            break
        taken.append(waiting.popleft())
    return taken


def attention_mask(body: Any, seen: Tensor) -> Tensor:
    """What each position sees, [rows, 1, positions, columns], in the form that the model's attention takes."""
    if body.config._attn_implementation != "eager":
        return seen
    return (~seen).to(body.dtype) * torch.finfo(body.dtype).min


@contextmanager
def grouped(model: Any) -> Iterator[None]:
    """In this context a model that attends by sdpa does not repeat keys and values for the queries of a group."""
    config = decoder(model).config
    own = config._attn_implementation
    if own == "sdpa":
        config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = own


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa for one query position, giving [rows, 1, heads, width]: the query heads that share a key
    head stand side by side, as if they were positions. More positions are left to transformers."""
    rows, heads, length, width = query.shape
    if length > 1 or attention_mask is None or "position_bias" in named:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **named)
    folded = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    if query.device.type == "cpu":  # where the fused kernel takes twice as long for a few positions
        scores = (folded @ key.mT).to(torch.promote_types(query.dtype, torch.float32))
        scores = (scores * (width**-0.5 if scaling is None else scaling)).masked_fill_(~attention_mask, -torch.inf)
        attended = scores.softmax(-1).to(value.dtype) @ value
    else:
        attended = scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(rows, 1, heads, -1), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
