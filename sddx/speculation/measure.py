"""What a draft is worth to its target: tokens that stay, passes saved, time and memory."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import eq
from time import perf_counter
from typing import Any

import torch

from sddx.compression.soundness import cache_bytes
from sddx.config.build import Node
from sddx.data.encode import fitting
from sddx.errors import UserError
from sddx.models.anatomy import bare, blocks, head
from sddx.models.decoding import Progress, greedy, is_batchable, write
from sddx.models.load import context_of
from sddx.models.outputs import run
from sddx.records import Count, NonNegative, Seed
from sddx.speculation.decoding import Sampling, can_draft, speculate
from sddx.speculation.rules import Counts, forced, speed_up

ROOM = "speculation.max_new_tokens"  # what to lower where no prompt leaves room
WARM = 4  # tokens that are written untimed


@dataclass(frozen=True)
class Written:
    """Texts, the seconds that they took, and on CUDA the most bytes that were held meanwhile."""

    texts: list[list[int]]
    counts: list[Counts]
    seconds: float
    peak: int | None

    @property
    def speed(self) -> float:
        """Tokens a second, prompts read and all."""
        return sum(map(len, self.texts)) / self.seconds


@dataclass(frozen=True)
class Drafts:
    """The group `speculation`: how drafts are tried. `size` held-out prompts of the run's data set, and of each of
    `datasets` beside it, are gone on with by up to `max_new_tokens`, so many rows at once, at each of `lookaheads`;
    greedily at a `temperature` of 0, else drawn by `seed`. Raises UserError for lookaheads that are none."""

    lookaheads: list[int]
    size: Count
    max_new_tokens: Count
    batch_size: Count
    temperature: NonNegative
    seed: Seed
    datasets: Mapping[str, Node]

    def __post_init__(self) -> None:
        wrong = [each for each in self.lookaheads if type(each) is not int or each < 1]
        if wrong or not self.lookaheads or len(set(self.lookaheads)) < len(self.lookaheads):
            raise UserError(
                f"speculation.lookaheads={self.lookaheads}: tokens that are drafted at a time. Give one number or "
                "more, each once and from 1."
            )

    @property
    def new(self) -> int:
        """The tokens for which there must be room after a prompt."""
        return self.max_new_tokens + max(self.lookaheads) + 1

    def __call__(
        self,
        target: Any,
        draft: Any,
        prompts: Sequence[Sequence[int]],
        ends: Sequence[int],
        progress: Progress = lambda rows: None,
    ) -> dict[str, Any]:
        """What `draft` is worth to `target` over the first prompts, each a list of tokens.

        Under `lookaheads` stand counts and rates (`rules.Counts`), how many texts are those of plain decoding (None
        where both are drawn), and the speed-up that the acceptance promises at `cost`, the weights that a step of
        the draft reads over the target's; under `forced`, of greedy text, counts and rates for every lookahead up
        to the largest, from one pass over plain decoding's text; under `bytes` weights and memories of plain
        decoding, of both models in one set of weights, and of two copies. What stands under `measured` is of this
        machine: tokens a second, the speed-up, and what the acceptance promises at the cost measured.

        Raises UserError for a model that cannot go back in a text, and where no prompt leaves room in the context.
        """
        asked = fitting(context_of(target.config), prompts[: self.size], self.new, ROOM)
        for model in (target, draft):
            require_route(model, max(map(len, asked)) + self.max_new_tokens)
        self._warm(target, draft, asked, ends)
        plain = self._plain(target, asked, progress, ends=ends, max_new_tokens=self.max_new_tokens)
        # The draft by itself writes as many tokens to each prompt: its steps are timed on batches that are as full.
        alone = self._plain(draft, asked, progress, ends=[], max_new_tokens=[len(text) for text in plain.texts])
        drafted = {ahead: self._drafted(target, draft, asked, ends, progress, ahead) for ahead in self.lookaheads}
        cost = _read_by_step(draft) / _read_by_step(target)
        to_be = None if self.temperature else plain.texts  # what is drawn only has one distribution
        outcomes = {str(ahead): _outcome(each, to_be, ahead, cost) for ahead, each in drafted.items()}
        return {
            "prompts": len(asked),
            "skipped": len(prompts[: self.size]) - len(asked),
            "temperature": self.temperature,
            "cost": cost,
            "lookaheads": outcomes,
            "forced": {} if self.temperature else _forced(draft, asked, plain.texts, max(drafted), self.batch_size),
            "bytes": _bytes(target, draft, max(map(len, asked)) + self.new, min(self.batch_size, len(asked))),
            "measured": _measured(target, plain, alone, drafted, outcomes),
        }

    def _plain(self, model: Any, prompts: Sequence[Sequence[int]], progress: Progress, **until: Any) -> Written:
        """The texts that a model writes alone, `until` so many tokens or an end."""
        sampling = Sampling(prompts, self.max_new_tokens, self.temperature, self.seed)
        pick = sampling.pick if self.temperature else greedy
        return _timed(model, write, prompts, pick, progress, batch_size=self.batch_size, **until)

    def _drafted(
        self,
        target: Any,
        draft: Any,
        prompts: Sequence[Sequence[int]],
        ends: Sequence[int],
        progress: Progress,
        ahead: int,
    ) -> Written:
        drawing: dict[str, Any] = {"temperature": self.temperature, "seed": self.seed}
        drawing |= {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size, "ends": ends}
        return _timed(target, speculate, draft, prompts, progress, lookahead=ahead, **drawing)

    def _warm(self, target: Any, draft: Any, prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> None:
        """Write a little untimed: a first pass loads what later ones find."""
        few = replace(self, max_new_tokens=WARM)
        few._drafted(target, draft, prompts[: self.batch_size], ends, lambda rows: None, 1)


def require_route(model: Any, longest: int) -> None:
    """Raises UserError for a model that cannot go back in texts of so many tokens."""
    if not (can_draft(model, longest) and is_batchable(model, longest)):
        raise UserError(
            f"A {type(bare(model)).__name__} cannot go back in texts of {longest} tokens: it forgets some of them, "
            "or takes no mask. Leave out +speculation, or lower speculation.max_new_tokens."
        )


def _timed(model: Any, writing: Callable[..., Any], *arguments: Any, **options: Any) -> Written:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = perf_counter()
    made = writing(model, *arguments, **options)
    seconds = perf_counter() - start  # what was asked of the device is done: its tokens are here
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    texts, counts = made if isinstance(made, tuple) else (made, [])
    return Written(texts, counts, seconds, peak)


def _outcome(
    written: Written, plain: Sequence[Sequence[int]] | None, lookahead: int, cost: float
) -> dict[str, Any]:
    """What became of drafts of one length."""
    same = None if plain is None else sum(map(eq, written.texts, plain))
    return {**_counted(sum(written.counts, Counts()), lookahead, cost), "same_texts": same}


def _counted(counts: Counts, lookahead: int, cost: float) -> dict[str, Any]:
    rates = counts.rates
    promised = speed_up(rates["acceptance"] or 0.0, lookahead, cost)
    return {**asdict(counts), **rates, "promised": promised}


def _forced(
    draft: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], most: int, batch_size: int
) -> dict[str, Any]:
    """By lookahead, what greedy drafts come to on these texts, from one pass over each."""
    agreeing = hits(draft, prompts, texts, batch_size)
    totals = {ahead: sum((forced(row, ahead) for row in agreeing), Counts()) for ahead in range(1, most + 1)}
    return {str(ahead): {**asdict(counts), **counts.rates} for ahead, counts in totals.items()}


def hits(
    model: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], batch_size: int
) -> list[list[bool]]:
    """Whether the model's likeliest token is the text's, at every token of each text after its prompt."""
    agreeing: list[list[bool]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]) - len(texts[row]))
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        whole = [[*prompts[row], *texts[row]] for row in rows]
        width = max(map(len, whole))
        ids = torch.tensor([each + [0] * (width - len(each)) for each in whole], device=device)
        mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in whole], device=device)
        with torch.no_grad():
            outputs = run(model, ids, mask)
            for place, row in enumerate(rows):
                before = slice(len(prompts[row]) - 1, len(whole[place]) - 1)
                likeliest = outputs.head(outputs.hidden[place, before]).argmax(-1)
                agreeing[row] = (likeliest == ids[place, len(prompts[row]) : len(whole[place])]).tolist()
    return agreeing


def _read_by_step(model: Any) -> int:
    """The weights that a step of decoding reads: those of the blocks and of the head."""
    return sum(weight.numel() for part in (blocks(model), head(model)) for weight in part.parameters())


def _bytes(target: Any, draft: Any, columns: int, rows: int) -> dict[str, int]:
    """Weights, and the memory of so many texts of so many tokens: of the target alone, with the draft in the same
    weights, and with the draft in weights of its own."""
    memories = [rows * columns * cache_bytes(model) for model in (target, draft)]
    return {
        "plain": _weights(target) + memories[0],
        "one_copy": _weights(target, draft) + sum(memories),
        "two_copies": _weights(target) + _weights(draft) + sum(memories),
    }


def _weights(*models: Any) -> int:
    """The bytes of the weights of these models, those that they share once."""
    held = {id(weight): weight.nbytes for model in models for weight in model.parameters()}
    return sum(held.values())


def _measured(
    target: Any, plain: Written, alone: Written, drafted: dict[int, Written], outcomes: dict[str, Any]
) -> dict[str, Any]:
    """What is true of this machine alone."""
    device, cost = next(target.parameters()).device, plain.speed / alone.speed
    peaks = [each.peak for each in drafted.values() if each.peak is not None]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "tokens_per_second": {"plain": plain.speed, "draft": alone.speed},
        "cost": cost,
        "lookaheads": {
            str(ahead): {
                "tokens_per_second": each.speed,
                "speed_up": each.speed / plain.speed,
                "promised": speed_up(outcomes[str(ahead)]["acceptance"] or 0.0, ahead, cost),
            }
            for ahead, each in drafted.items()
        },
        "peak_bytes": {"plain": plain.peak, "drafted": max(peaks)} if peaks else None,
    }
