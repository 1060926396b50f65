"""Self-data: the unpruned model writes its own answers, and each is kept only if it passes.

The conditional selection of SDFT (arXiv 2402.13669): an answer is kept where it leaks no template and where its
final answer agrees with the reference's; elsewhere the reference stays.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from sddx.data.checkers import Reason
from sddx.data.encode import ending, padding_id, render, token_ids
from sddx.data.templates import leaks
from sddx.errors import UserError
from sddx.models.generation import neutral
from sddx.models.load import context_of
from sddx.records import Count, Example, Natural, NonNegative, PositiveShare, Rewrite, Seed

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

    from sddx.models.decoding import Progress

CUT_OFF = "cut off at max_new_tokens"
TOO_LONG = "prompt too long"
WRONG = "wrong answer"
REASONS = ("empty", CUT_OFF, TOO_LONG, "leak", WRONG)  # and those that a checker gives by itself


@dataclass(frozen=True)
class Answer:
    """What the model wrote; `fault` says why it is no whole answer (CUT_OFF, TOO_LONG), or is empty."""

    text: str
    fault: str = ""


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    progress: Progress = lambda rows: None,
    *,
    max_new_tokens: Count,
    batch_size: Count,
    temperature: NonNegative,
    top_p: PositiveShare,
    top_k: Natural,
    seed: Seed,
) -> list[Answer]:
    """The model's answer to each prompt (one user turn of the chat template each), in the order of the
    prompts.

    Greedy where `temperature` is 0. Otherwise sampled from the softmax of logits / temperature within the
    `top_k` likeliest tokens (0: all) and the smallest set of mass `top_p` (1: all); the choices of a row hang
    on (seed, its prompt, position) only. So neither its neighbours nor the batch size change a row, up to
    ties within the arithmetic's precision, and equal prompts get equal answers. The model's own generation
    settings (lengths, penalties, temperature) are not used, except for its end tokens. `progress` is told the rows
    that are done.

    An answer ends at the model's or the tokenizer's end token; one that has not ended after `max_new_tokens`,
    or whose prompt leaves no room for them in the model's context, carries a fault.
    """
    from sddx.models.decoding import is_batchable

    texts = [render(tokenizer, prompt) for prompt in prompts]
    tokens = token_ids(tokenizer, texts)
    room = context_of(model.config) or float("inf")
    fitting = [row for row in range(len(prompts)) if len(tokens[row]) + max_new_tokens <= room]
    answers = [Answer("", TOO_LONG)] * len(prompts)
    progress(len(prompts) - len(fitting))
    ends = end_ids(model, tokenizer)
    asked = [tokens[row] for row in fitting]
    streams = [random.Random(f"{seed}/{texts[row]}") for row in fitting]
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    batchable = bool(asked) and is_batchable(model, max(map(len, asked)) + max_new_tokens)
    form: dict[str, Any] = {"ends": ends, "pad": padding_id(tokenizer), "batchable": batchable}
    limits = [max_new_tokens] * len(asked)
    written = continued(model, asked, limits, sampling, streams, progress, batch_size=batch_size, **form)
    for row, ids in zip(fitting, written, strict=True):
        answers[row] = answer_of(tokenizer, ids, ends)
    return answers


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest at a temperature of 0, else one drawn from the softmax of
    logits / temperature within the `top_k` likeliest (0: all) and the smallest set of mass `top_p` (1: all)."""

    temperature: float
    top_p: float
    top_k: int


def continued(
    model: Any,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    sampling: Sampling,
    streams: Sequence[random.Random],
    progress: Progress = lambda rows: None,
    *,
    batch_size: int,
    ends: list[int],
    pad: int,
    batchable: bool,
) -> list[list[int]]:
    """The tokens that a model puts after each prompt, up to the first of `ends` and at most as many as its limit.
    Each row draws from a stream of its own, so that none hangs on its neighbours. `batchable`: whether
    `is_batchable` holds of the model and the longest of these texts."""
    from sddx.models.decoding import greedy, write

    uniforms = _uniforms(streams, max(limits, default=0)) if sampling.temperature > 0 else None
    options: dict[str, Any] = {"batch_size": batch_size, "ends": ends}
    if batchable:
        pick = greedy if uniforms is None else partial(_picked, uniforms, asdict(sampling))
        return write(model, prompts, pick, progress, max_new_tokens=limits, **options)
    written: list[list[int]] = [[]] * len(prompts)
    for limit in sorted(set(limits)):
        rows = [row for row, own in enumerate(limits) if own == limit]
        drawn = None if uniforms is None else uniforms[rows]
        asked, options["max_new_tokens"] = [prompts[row] for row in rows], limit
        made = _by_generate(model, asked, drawn, asdict(sampling), pad, progress, **options)
        for row, ids in zip(rows, made, strict=True):
            written[row] = ids
    return written


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the generation config, the tokenizer's, and the chat
    template's."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    known = [configured] if isinstance(configured, int) else list(configured or [])
    template = tokenizer.convert_tokens_to_ids(ending(tokenizer).token)
    return sorted({*known, template, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def judge(
    examples: Sequence[Example],
    answers: Sequence[Answer],
    *,
    check: Callable[[str, str], bool | Reason],
    template: str | None = None,
) -> list[Rewrite]:
    """Set each answer against its example's reference; ids and order are kept.

    Refused are, in this order: an answer with a fault (see `Answer`), an empty one, one that leaks the rewriting
    `template` (None: none was shown), and one that `check(answer, reference)` finds wrong, or gives a reason
    against.
    """
    pairs = zip(examples, answers, strict=True)
    reasons = [_reason(answer, example.response, check, template) for example, answer in pairs]
    return [
        Rewrite(example.id, example.prompt, example.response, answer.text, reason)
        for example, answer, reason in zip(examples, answers, reasons, strict=True)
    ]


@dataclass(frozen=True)
class SelfData:
    """What is done about answers that may not be trained on (`fallback`, see `distil`), and two dials for controls.

    `check` decides which these are: the data set's own (`dataset`), what can be told of an answer to an open
    instruction (`open`, see `sddx.data.checkers.open_answer`), or whole answers that leak nothing (`none`).
    `reference` is what the rewriting prompt shows: the row's own answer (`right`), or that of another row
    (`wrong`), which tells the style of the writer from what the reference says.
    """

    fallback: Literal["reference", "drop"]
    check: Literal["dataset", "open", "none"] = "dataset"
    reference: Literal["right", "wrong"] = "right"

    def __call__(self, rewrites: Sequence[Rewrite]) -> list[Example]:
        return distil(rewrites, fallback=self.fallback)


def strangers(examples: Sequence[Example], seed: int) -> list[str]:
    """For each example the reference of another one, drawn with `seed`: none keeps its own, and each is used once.
    Raises UserError for a single example."""
    if len(examples) < 2:
        raise UserError(
            "selfdata.reference=wrong shows the reference of another row, and a shard of rows has only one. Use a "
            "dataset.size and a validation that leave more (a shard has 256 rows)."
        )
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [examples[after[place]].response for place in range(len(examples))]


def distil(rewrites: Sequence[Rewrite], *, fallback: Literal["reference", "drop"]) -> list[Example]:
    """Training examples: the model's answer (origin `self`) where it was accepted; elsewhere the reference,
    with the reason as its note (`fallback="reference"`, the method), or no row (`fallback="drop"`).
    """
    return [_example(rewrite) for rewrite in rewrites if fallback == "reference" or not rewrite.reason]


def acceptance(rewrites: Sequence[Rewrite]) -> dict[str, int]:
    """How many answers were written, accepted, and refused for each reason."""
    reasons = [rewrite.reason for rewrite in rewrites if rewrite.reason]
    counts = {"examples": len(rewrites), "accepted": len(rewrites) - len(reasons)}
    return counts | {reason: reasons.count(reason) for reason in dict.fromkeys([*REASONS, *reasons])}


class _Choose:
    """Sampling as arithmetic: leaves each row the first token whose cumulative probability exceeds the row's
    uniform number for this position (inverse transform), so that the greedy choice is the sample."""

    def __init__(self, uniforms: torch.Tensor, prompt_width: int) -> None:
        self.uniforms, self.prompt_width = uniforms, prompt_width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        heaped = scores.double().softmax(-1).cumsum(-1)
        uniform = self.uniforms[:, input_ids.shape[1] - self.prompt_width, None].to(scores.device)
        chosen = (heaped <= uniform * heaped[:, -1:]).sum(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


def _uniforms(streams: Sequence[random.Random], positions: int) -> torch.Tensor:
    """One number in [0, 1) for every row and position: [batch, positions], float64. Python promises that a
    generator seeded with a text gives the same numbers in every version and on every machine."""
    return torch.tensor([[stream.random() for _ in range(positions)] for stream in streams], dtype=torch.float64)


def _sampling(
    uniforms: torch.Tensor, prompt_width: int, temperature: float, top_p: float, top_k: int
) -> LogitsProcessorList:
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))]
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return LogitsProcessorList([*warpers, _Choose(uniforms, prompt_width)])


def _picked(
    uniforms: torch.Tensor,
    sampling: dict[str, Any],
    rows: Sequence[int],
    places: Sequence[int],
    logits: torch.Tensor,
) -> torch.Tensor:
    """The sample of each row at its own place."""
    choose = _sampling(uniforms[rows, places][:, None], 0, **sampling)
    return choose(torch.empty(len(rows), 0, dtype=torch.long, device=logits.device), logits).argmax(-1)


def _by_generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    uniforms: torch.Tensor | None,
    sampling: dict[str, Any],
    pad: int,
    progress: Progress,
    *,
    max_new_tokens: int,
    batch_size: int,
    ends: list[int],
) -> list[list[int]]:
    """The tokens after each prompt by transformers' own `generate`, batch by batch, for models of any kind."""
    from transformers import LogitsProcessorList

    written: list[list[int]] = [[]] * len(prompts)
    # Rows of like length share a batch, and the largest batch comes first.
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        choose = LogitsProcessorList()
        if uniforms is not None:
            choose = _sampling(uniforms[batch], len(prompts[batch[0]]), **sampling)
        continuations = _continue(model, [prompts[row] for row in batch], choose, max_new_tokens, ends, pad)
        for row, ids in zip(batch, continuations, strict=True):
            stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
            written[row] = ids[: stop + 1]  # padding stands behind
        progress(len(batch))
    return written


def _continue(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    choose: LogitsProcessorList,
    max_new_tokens: int,
    ends: list[int],
    pad: int,
) -> list[list[int]]:
    """The tokens that the model puts after each prompt, with padding after an end token. Prompts stand at the
    right, so that all rows go on at the same position."""
    from transformers import GenerationConfig

    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device
    )
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad)
    asked = {"input_ids": ids, "attention_mask": mask, "generation_config": settings, "logits_processor": choose}
    with neutral(model):
        whole = model.generate(**asked)
    return whole[:, width:].tolist()


def answer_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: list[int]) -> Answer:
    """The answer in the tokens that a model wrote: up to the first that ends it, or cut off."""
    stop = next((place for place, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(text.strip(), "" if stop is not None else CUT_OFF)


def _reason(
    answer: Answer, reference: str, check: Callable[[str, str], bool | Reason], template: str | None
) -> str:
    if answer.fault:
        return answer.fault
    if not answer.text.strip():
        return "empty"
    if template is not None and leaks(answer.text, template):
        return "leak"
    verdict = check(answer.text, reference)
    return verdict if isinstance(verdict, Reason) else "" if verdict else WRONG


def _example(rewrite: Rewrite) -> Example:
    if rewrite.reason:
        return Example(rewrite.id, rewrite.prompt, rewrite.reference, "reference", rewrite.reason)
    return Example(rewrite.id, rewrite.prompt, rewrite.answer, "self")
