"""Log-likelihoods of continuations: what texts begin with is read once, for all that go on from there.

Texts in the order of their tokens are put side by side into one row, in which each shared beginning stands once: a
token attends to those before it in its own text, by a mask, and is told its place there. So a question is read once
for all its answers, and few-shot examples once for many questions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from sddx.models.anatomy import decoder, vocabulary
from sddx.models.decoding import attention_mask, grouped, holds, remembers_all
from sddx.models.outputs import head_of

# A text joins a row where at least this share of it stands there already, up to so many tokens in the row, or twice
# its own. Attention pays for the square of a row, from here on more than is shared (docs/benchmarks.md).
SHARED, ROW_TOKENS = 0.25, 256
# What one pass reads at most, in padded tokens, and how many logits are there at once.
PASS_TOKENS, LOGITS = 2048, 1 << 24

Asked = tuple[Sequence[int], Sequence[int]]
Head = Callable[[Tensor], Tensor]


@dataclass
class Row:
    """Texts side by side: the tokens, each with its place in its text, and for each text, by its number, the
    columns on which its tokens stand and how many of them, at the end, are its own."""

    tokens: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    texts: dict[int, tuple[list[int], int]] = field(default_factory=dict)

    def add(self, number: int, text: Sequence[int], before: Sequence[int]) -> None:
        """Put a text there of which the columns `before` hold the beginning."""
        first, shared = len(self.tokens), len(before)
        own = len(text) - shared
        self.tokens += text[shared:]
        self.places += range(shared, len(text))
        self.texts[number] = [*before, *range(first, first + own)], own

    def seen(self, width: int) -> Tensor:
        """Which columns each column attends to, [width, width]. Padding sees itself: it must see something."""
        seen = torch.eye(width, dtype=torch.bool)
        for columns, own in self.texts.values():
            path = torch.tensor(columns)
            seen[path[len(path) - own :, None], path] = torch.ones(own, len(path)).tril(len(path) - own).bool()
        return seen


def likelihoods(model: Any, asked: Sequence[Asked]) -> Iterator[tuple[int, tuple[float, bool]]]:
    """For each (text, continuation), in tokens, of which the text ends with all of the continuation but its last
    token: its number, the log-likelihood of the continuation in nats, and whether greedy writing would give it. As
    they come, in no order. For models of which `is_packable` holds."""
    rows = packed_rows([text for text, _ in asked])
    head = head_of(model)
    for batch in _batches(rows):
        yield from _scored(model, head, batch, asked)


def is_packable(model: Any, longest: int) -> bool:
    """Whether `likelihoods` holds for this model and texts of at most so many tokens: it `remembers_all` of them,
    and it is proven, on two short texts, that it reads positions and masks as they are given."""
    return remembers_all(model, longest) and holds(model, _packed_and_apart)


def packed_rows(texts: Sequence[Sequence[int]]) -> list[Row]:
    """All texts, each behind the one whose tokens come before its own, in the same row where they share enough."""
    rows: list[Row] = []
    before: Sequence[int] = []
    path: list[int] = []
    for number in sorted(range(len(texts)), key=lambda number: list(texts[number])):
        text = texts[number]
        shared = len(os.path.commonprefix([list(before), list(text)]))
        fits = rows and len(rows[-1].tokens) + len(text) - shared <= max(ROW_TOKENS, 2 * len(text))
        if not fits or shared < SHARED * len(text):
            rows.append(Row())
            shared = 0
        rows[-1].add(number, text, path[:shared])
        before, path = text, rows[-1].texts[number][0]
    return rows


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of like length, the longest first."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batch and len(batch[0].tokens) * (len(batch) + 1) > PASS_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _states(model: Any, rows: Sequence[Row]) -> Tensor:
    """The final hidden states of rows, [rows, columns, width]."""
    body, width = decoder(model), max(len(row.tokens) for row in rows)
    device = next(body.parameters()).device
    ids, places = (
        torch.tensor([[*values, *[0] * (width - len(values))] for values in column], device=device)
        for column in ([row.tokens for row in rows], [row.places for row in rows])
    )
    seen = torch.stack([row.seen(width) for row in rows])[:, None].to(device)
    with grouped(model):
        mask = attention_mask(body, seen)
        return body(input_ids=ids, position_ids=places, attention_mask=mask, use_cache=False).last_hidden_state


@torch.no_grad()
def _scored(
    model: Any, head: Head, rows: Sequence[Row], asked: Sequence[Asked]
) -> list[tuple[int, tuple[float, bool]]]:
    """The answers for all texts in some rows."""
    states = _states(model, rows)
    numbers: list[int] = []
    columns: list[int] = []
    tokens: list[int] = []
    for at, row in enumerate(rows):
        for number, (path, _) in row.texts.items():
            continuation = asked[number][1]
            numbers.append(number)
            columns += [at * states.shape[1] + column for column in path[-len(continuation) :]]
            tokens += continuation
    likely, greedy = _judged(head, max(1, LOGITS // vocabulary(model)), states.flatten(0, 1), columns, tokens)
    sizes = [len(asked[number][1]) for number in numbers]
    parts = zip(numbers, likely.split(sizes), greedy.split(sizes), strict=True)
    return [(number, (float(some.sum()), bool(all_of.all()))) for number, some, all_of in parts]


def _judged(head: Head, size: int, states: Tensor, columns: list[int], tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Of each token the log-probability in the state of its column, and whether it is the likeliest there. The head
    reads each column once, `size` of them at a time."""
    wanted, which = torch.tensor(columns, device=states.device).unique(return_inverse=True)
    targets = torch.tensor(tokens, device=states.device)
    likely, greedy = (
        targets.new_empty(len(tokens), dtype=torch.float32),
        targets.new_empty(len(tokens), dtype=torch.bool),
    )
    for first in range(0, len(wanted), size):
        table = log_softmax(head(states[wanted[first : first + size]]), -1, dtype=torch.float32)
        here = (which // size == first // size).nonzero()[:, 0]
        at, token = which[here] - first, targets[here]
        likely[here], greedy[here] = table[at, token], table.argmax(-1)[at] == token
    return likely, greedy


def _packed_and_apart(model: Any) -> tuple[Tensor, Tensor]:
    """The states of two texts side by side, and those that each has when it is read alone."""
    texts = [[token % vocabulary(model) for token in text] for text in ([1, 2, 3, 4], [1, 2, 5])]
    (row,) = packed_rows(texts)
    states = _states(model, [row])[0]
    inputs = [torch.tensor([text], device=states.device) for text in texts]
    alone = [decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in inputs]
    return torch.cat([states[row.texts[number][0]] for number in range(len(texts))]), torch.cat(alone)
