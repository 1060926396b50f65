"""Speculative decoding of batches of any size, by two models with memories of their own.

A row's tokens stand in its memory at the columns of their positions, and each sees the columns up to its own. So to
go back is to forget how far one was: what stands behind is not seen, and written over.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sddx.models.anatomy import blocks, decoder, vocabulary
from sddx.models.decoding import Progress, attention_mask, grouped, holds, remembers_all
from sddx.models.outputs import head_of
from sddx.models.packing import packed
from sddx.speculation.rules import Counts, drawn, greedy, sampled, verdict


def speculate(
    target: Any,
    draft: Any,
    prompts: Sequence[Sequence[int]],
    progress: Progress = lambda rows: None,
    *,
    lookahead: int,
    max_new_tokens: int,
    batch_size: int,
    ends: Sequence[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[list[list[int]], list[Counts]]:
    """The tokens that the target puts after each prompt, in the order of the prompts, up to the first of `ends` and
    at most `max_new_tokens`, of which the draft proposes `lookahead` at a time; and what became of the proposals.

    At a `temperature` of 0 they are the target's likeliest, token for token (but for ties within the arithmetic's
    precision); else they are distributed as the target's softmax of logits / temperature, and hang on (seed,
    prompt, position) only, so that neither neighbours nor batches change them. `progress` is told how many rows
    have ended. For models of which `can_draft` holds, with one vocabulary, and texts that leave room for
    `lookahead` + 1 tokens more than they may have.
    """
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    most = max_new_tokens + lookahead + 1
    rule = Sampling(prompts, most, temperature, seed) if temperature else _Greedy()
    texts = _Texts(prompts, max_new_tokens, ends)
    with torch.no_grad(), packed(target), packed(draft), grouped(target), grouped(draft):
        for at in range(0, len(order), batch_size):
            rows = order[at : at + batch_size]
            room = len(rows), len(prompts[rows[0]]) + most
            batch = _Batch(Route(draft, *room), Route(target, *room), rows, rule, lookahead)
            while batch.rows:
                batch.round(texts)
                progress(batch.settle(texts))
    return texts.written, texts.counts


class _Texts:
    """What stands after each prompt, and what it took."""

    def __init__(self, prompts: Sequence[Sequence[int]], most: int, ends: Sequence[int]) -> None:
        self.prompts, self.most, self.ends = prompts, most, ends
        self.written: list[list[int]] = [[] for _ in prompts]
        self.counts = [Counts() for _ in prompts]

    def whole(self, row: int) -> list[int]:
        """The prompt and what stands after it."""
        return [*self.prompts[row], *self.written[row]]

    def take(self, row: int, new: Sequence[int], accepted: int, lookahead: int) -> None:
        """Add what a pass brought, as far as the text goes; `accepted` of it was drafted."""
        end = next((place + 1 for place, token in enumerate(new) if token in self.ends), len(new))
        kept = new[: min(end, self.most - len(self.written[row]))]
        self.written[row] += kept
        self.counts[row] += verdict(accepted, len(kept), lookahead)

    def is_over(self, row: int) -> bool:
        return len(self.written[row]) == self.most or self.written[row][-1] in self.ends


class _Batch:
    """Rows that are written side by side; `rows` are their numbers."""

    def __init__(self, draft: Route, target: Route, rows: Sequence[int], rule: Any, lookahead: int) -> None:
        self.draft, self.target, self.rows = draft, target, list(rows)
        self.rule, self.lookahead = rule, lookahead

    def round(self, texts: _Texts) -> None:
        """Draft, read the drafts, and add to each text what stays of them and the target's own token."""
        grown = [texts.whole(row) for row in self.rows]
        places = [len(texts.written[row]) for row in self.rows]
        for step in range(self.lookahead):
            logits = self.draft.read(grown)[:, 0]
            tokens = self.rule.propose(self.rows, [place + step for place in places], logits)
            for text, token in zip(grown, tokens.tolist(), strict=True):
                text.append(token)
        drafted = [text[-self.lookahead :] for text in grown]
        logits = self.target.read(grown, self.lookahead + 1)
        judged = self.rule.judge(self.rows, places, torch.tensor(drafted, device=logits.device), logits)
        verdicts = zip(self.rows, drafted, *(each.tolist() for each in judged), strict=True)
        for row, tokens, accepted, own in verdicts:
            texts.take(row, [*tokens[:accepted], own], accepted, self.lookahead)

    def settle(self, texts: _Texts) -> int:
        """Go back to what the texts have come to, of which the last token is still to be read, and let go of those
        that are over: how many that are."""
        for route in (self.draft, self.target):
            route.back([len(texts.whole(row)) - 1 for row in self.rows])
        over = [place for place, row in enumerate(self.rows) if texts.is_over(row)]
        for place in reversed(over):
            self.draft.drop(place)
            self.target.drop(place)
            self.rows[place] = self.rows[-1]
            self.rows.pop()
        return len(over)


class _Greedy:
    """The likeliest token, of the draft and of the target."""

    def propose(self, rows: Sequence[int], places: Sequence[int], logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def judge(self, rows: Sequence[int], places: Sequence[int], drafted: Tensor, logits: Tensor) -> Any:
        return greedy(drafted, logits)


class Sampling:
    """Tokens drawn at a temperature, by three numbers in [0, 1) for each row and place: one proposes, one says
    whether that stays, one draws what comes instead. A place that is drafted again after a refusal before it takes
    the same numbers, on which that refusal did not hang."""

    def __init__(self, prompts: Sequence[Sequence[int]], places: int, temperature: float, seed: int) -> None:
        streams = [random.Random(f"{seed}/{list(prompt)}") for prompt in prompts]
        numbers = [[[stream.random() for _ in range(3)] for _ in range(places)] for stream in streams]
        self.uniforms = torch.tensor(numbers, dtype=torch.float64)
        self.temperature = temperature
        self.proposed: list[Tensor] = []

    def pick(self, rows: Sequence[int], places: Sequence[int], logits: Tensor) -> Tensor:
        """A token for each row, [rows], at its own place, by logits [rows, vocabulary]."""
        return drawn(self._odds(logits), self.uniforms[rows, places, 0].to(logits.device))

    def propose(self, rows: Sequence[int], places: Sequence[int], logits: Tensor) -> Tensor:
        """The same; the probabilities that it was drawn by are kept for `judge`."""
        self.proposed.append(self._odds(logits))
        return self.pick(rows, places, logits)

    def judge(self, rows: Sequence[int], places: Sequence[int], drafted: Tensor, logits: Tensor) -> Any:
        """How many of the drafted tokens [rows, k] stay, and the target's own, by its logits [rows, k + 1,
        vocabulary] (`rules.sampled`)."""
        draft, self.proposed = torch.stack(self.proposed, dim=1), []
        ahead = torch.tensor(places)[:, None] + torch.arange(logits.shape[1])
        uniforms = self.uniforms[torch.tensor(rows)[:, None], ahead, 1:].to(logits.device)
        return sampled(drafted, draft, self._odds(logits), uniforms)

    def _odds(self, logits: Tensor) -> Tensor:
        return (logits.double() / self.temperature).softmax(-1)


class Route:
    """A model that reads on in several texts at once, each as far as it is, and can go back in them."""

    def __init__(self, model: Any, rows: int, columns: int) -> None:
        """Room for so many texts of so many tokens, and what a pass is filled up with."""
        self.body, self.head = decoder(model), head_of(model)
        self.device = next(self.body.parameters()).device
        self.rows, self.columns = rows, columns
        self.lengths = [0] * rows  # how far each text was read
        self.positions = torch.zeros(rows, 0, dtype=torch.long)  # of what is being read, [rows, width]
        self.used = 0  # columns
        self.cache = Cache(layers=[_Columns(self) for _ in blocks(model)])

    def read(self, texts: Sequence[Sequence[int]], last: int = 1) -> Tensor:
        """Read what is new in each text: the logits at its `last` tokens, float32 [rows, last, vocabulary]. At
        least so many are new."""
        new = [list(text[length:]) for text, length in zip(texts, self.lengths, strict=True)]
        width = max(map(len, new))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in new], device=self.device)
        starts = torch.tensor(self.lengths, device=self.device)
        self.positions = starts[:, None] + torch.arange(width, device=self.device)
        self.used = max(self.lengths) + width
        seen = torch.arange(self.used, device=self.device) <= self.positions[..., None]
        hidden = self.body(
            input_ids=ids,
            position_ids=self.positions,
            attention_mask=attention_mask(self.body, seen[:, None]),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.lengths = [len(text) for text in texts]
        ends = torch.tensor([[len(row)] for row in new], device=self.device)
        places = ends - last + torch.arange(last, device=self.device)
        return self.head(hidden[torch.arange(len(new), device=self.device)[:, None], places]).float()

    def back(self, lengths: Sequence[int]) -> None:
        """Know no more of each text than so many tokens."""
        self.lengths = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]

    def drop(self, row: int) -> None:
        """Let go of a text; the last one takes its place."""
        last = len(self.lengths) - 1
        for layer in self.cache.layers if row != last else ():
            for memory in (layer.keys, layer.values):
                if memory is not None:
                    memory[row] = memory[last]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()


class _Columns(CacheLayerMixin):
    """Keys and values of one block, [rows, heads, columns, width], in memory that is taken once."""

    is_sliding = False

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, since what a mask hides is multiplied by zero and must be a number.
        shape = self.route.rows, key_states.shape[1], self.route.columns
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write what is being read at its positions, and hand out all columns in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        positions = self.route.positions
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[rows, :, positions] = key_states.transpose(1, 2)
        self.values[rows, :, positions] = value_states.transpose(1, 2)
        return self.keys[: len(rows), :, : self.route.used], self.values[: len(rows), :, : self.route.used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.route.used, 0

    def get_seq_length(self) -> int:
        return self.route.used - self.route.positions.shape[1] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.route.columns


def can_draft(model: Any, longest: int) -> bool:
    """Whether a `Route` holds for this model and texts of at most so many tokens: it remembers all of them, and it
    is proven, on two short rows, that it goes back as it is told."""
    return remembers_all(model, longest) and holds(model, _there_and_back)


def _there_and_back(model: Any) -> tuple[Tensor, Tensor]:
    """The logits of two rows that were read on, gone back in and read on otherwise; and those of each row read at
    once, alone."""
    size = vocabulary(model)
    first, second, astray = ([token % size for token in row] for row in ([1, 2, 3, 4, 5], [1, 5, 6], [7, 8, 9]))
    with grouped(model):
        route = Route(model, 2, 9)
        route.read([first[:3] + astray, second[:1] + astray])
        route.back([3, 1])
        back = route.read([first, second], 2)
    rows = [torch.tensor([row], device=route.device) for row in (first, second)]
    hidden = torch.cat([route.body(input_ids=row, use_cache=False).last_hidden_state[:, -2:] for row in rows])
    once = route.head(hidden)  # whose dtype says how far rounding goes
    # What all tokens of a vocabulary have in common moves no probability, and would outweigh a fault.
    return back - back.mean(-1, keepdim=True), once - once.mean(-1, keepdim=True)
