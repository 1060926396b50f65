"""From text to token ids and labels. All masking and shifting of labels happens here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sddx.records import Batch, Example, UserError

IGNORED = -100
# How texts are read, for scoring, for patches and for held-out measures: so many at once, cut at so many tokens.
TEXT_BATCH, TEXT_LENGTH, TEXT_TOKENS = 32, 2048, 16_384

# Some chat templates think aloud, or print today's date, unless told otherwise: answers are trained, written and
# judged without thinking, and the same text is rendered on every day. Other templates ignore these names.
TEMPLATE_SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


@dataclass(frozen=True)
class Encoded:
    """One example as tokens: `labels[t]` is the token that position t must predict, or -100; `supervised`
    counts the labels that are trained."""

    id: str
    input_ids: list[int]
    labels: list[int]
    supervised: int


@dataclass(frozen=True)
class Ending:
    """How the assistant's turn ends in a chat template: all text after an answer, and its end token."""

    text: str
    token: str


def render(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str | None = None) -> str:
    """The chat template's text of one user turn, up to where the answer begins, or with the answer and all
    that the template puts after it. Raises UserError for a tokenizer without a chat template, and for one that
    does not render."""
    if not tokenizer.chat_template:
        raise UserError(
            "The tokenizer has no chat template, so prompts and answers cannot be told apart. Given: "
            f"{tokenizer.name_or_path or type(tokenizer).__name__}. Choose an instruction-tuned model, or "
            "put a chat_template into the model folder (chat_template.jinja)."
        )
    turns = [("user", prompt)] if response is None else [("user", prompt), ("assistant", response)]
    try:
        return _rendered(tokenizer, *turns)
    except TemplateError as error:
        raise UserError(
            f"The chat template does not render a user's turn: {type(error).__name__}: {error}. Use the template "
            "that belongs to the model."
        ) from error


def _rendered(tokenizer: PreTrainedTokenizerBase, *turns: tuple[str, str]) -> str:
    """The text of a conversation of (role, content), up to where an answer begins unless the last turn is one."""
    messages = [{"role": role, "content": content} for role, content in turns]
    asked = {"tokenize": False, "add_generation_prompt": turns[-1][0] != "assistant"}
    return str(tokenizer.apply_chat_template(messages, **asked, **TEMPLATE_SETTINGS))


def require_system_turn(tokenizer: PreTrainedTokenizerBase, tasks: Iterable[str]) -> None:
    """Raises UserError where the chat template drops a system turn, or refuses one, and `tasks`, if there are any,
    put their description into it: lm-eval would go on without, with a warning at most."""
    system, refusal, text = "Answer in one word.", "", ""
    if not (described := ", ".join(tasks)):
        return
    try:
        text = _rendered(tokenizer, ("system", system), ("user", "Hello"))
    except TemplateError as error:
        refusal = f" ({error})"
    if system not in text:
        raise UserError(
            f"The chat template drops the system prompt{refusal}, and evaluation.chat_template=true puts the "
            f"description of these tasks there: {described}. Use evaluation.chat_template=false, tasks without a "
            "description, or a template that keeps system turns (chat_template.jinja in the model folder)."
        )


def ending(tokenizer: PreTrainedTokenizerBase) -> Ending:
    """What the template writes after an answer. Its first special token ends the turn; where it holds none,
    the tokenizer's end-of-sequence token is put there. Raises UserError where there is neither, where the
    template drops the prompt or the answer, and where the rendered prompt is not the beginning of the rendered
    conversation."""
    prompt, answer = "Hello", "Good day"
    start, whole = render(tokenizer, prompt), render(tokenizer, prompt, answer)
    if prompt not in start:
        raise UserError(
            f"The chat template drops the user's prompt. Given: {prompt!r} is rendered as {start!r}. Use the "
            "template that belongs to the model."
        )
    if not whole.startswith(start) or answer not in whole[len(start) :]:
        raise UserError(
            "The chat template renders a prompt differently once it is answered, so the answer's tokens "
            f"cannot be found. Given: {start!r} and {whole!r}. Use a template whose generation prompt begins "
            "the answer."
        )
    text = whole[whole.rindex(answer) + len(answer) :]
    tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    places = [(text.index(token), -len(token), token) for token in tokens if token in text]
    if places:
        return Ending(text, min(places)[2])
    if tokenizer.eos_token is None:
        raise UserError(
            f"Nothing ends an answer: the chat template writes {text!r} after it and the tokenizer has no "
            "end-of-sequence token. Set eos_token in the model folder's tokenizer_config.json."
        )
    return Ending(text, str(tokenizer.eos_token))


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up a batch; it is never attended, so any will do where the tokenizer has none."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, *, max_length: int) -> Encoded | None:
    """One example as the chat template writes it, up to and including the token that ends the answer.

    The prompt and what the template puts before the answer are masked; the answer and its end token are
    labels. Tokens beyond `max_length` are cut off; None where no label is left (pitfall N: such rows are
    counted and dropped, see `encode_all`). Raises UserError as `render` and `ending` do.
    """
    return _encode(tokenizer, example, ending(tokenizer), max_length)


def encode_all(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], *, max_length: int
) -> tuple[list[Encoded], int]:
    """All examples that have a label left, in order, and the number of those dropped because they have none. Raises
    UserError as `encode` does."""
    end, examples = ending(tokenizer), list(examples)
    encoded = [_encode(tokenizer, example, end, max_length) for example in examples]
    rows = [row for row in encoded if row is not None]
    return rows, len(examples) - len(rows)


def collate(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Rows side by side, padded on the right to the longest: [batch, time], padding unattended and
    unlabelled."""
    width = max(len(row.input_ids) for row in rows)
    return Batch(
        torch.tensor([row.input_ids + [pad_id] * (width - len(row.input_ids)) for row in rows]),
        torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows]),
        torch.tensor([row.labels + [IGNORED] * (width - len(row.labels)) for row in rows]),
    )


def text_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = TEXT_LENGTH,
    batch_size: int = TEXT_BATCH,
) -> Iterator[Batch]:
    """Calibration texts in their order, cut at `max_length` tokens; every attended token but the first is a
    label. A batch has at most `batch_size` texts and, of more than one text, TEXT_TOKENS padded tokens: the states
    of all blocks are held for it.

    A text gets the tokenizer's own special tokens, unless it already begins with the begin-of-sequence token
    (a rendered conversation). Texts without a token are left out. Raises UserError where none has one.
    """
    rows = [row for text in texts if (row := _encode_text(tokenizer, text, max_length)).input_ids]
    if not rows:
        raise UserError(
            f"The calibration texts hold no token. Given: {len(texts)} texts, max_length {max_length}. "
            "Choose another column or file."
        )
    spans = text_spans([len(row.input_ids) for row in rows], batch_size)
    return (collate(rows[first:end], padding_id(tokenizer)) for first, end in spans)


def text_spans(lengths: Sequence[float], batch_size: int = TEXT_BATCH) -> list[tuple[int, int]]:
    """The batches of texts of these lengths, each as (first, one past the last)."""
    spans, first = [], 0
    for place in range(1, len(lengths) + 1):
        more = place < len(lengths) and place - first < batch_size
        if not more or max(lengths[first : place + 1]) * (place + 1 - first) > TEXT_TOKENS:
            spans.append((first, place))
            first = place
    return spans


def _encode(tokenizer: PreTrainedTokenizerBase, example: Example, end: Ending, max_length: int) -> Encoded | None:
    prompt = render(tokenizer, example.prompt)
    whole = render(tokenizer, example.prompt, example.response).removesuffix(end.text) + _up_to_token(end)
    if not whole.startswith(prompt):
        raise UserError(
            "The chat template renders this prompt differently once it is answered, so its labels cannot be "
            f"told. Given: example {example.id}, {example.prompt[:80]!r}. Use another template, or drop the "
            "row."
        )
    prompt_ids, ids = _tokens(tokenizer, prompt), _tokens(tokenizer, whole)
    if ids[: len(prompt_ids)] != prompt_ids:
        # The tokenizer merges across the boundary; a model that answers never sees that merge.
        ids = prompt_ids + _tokens(tokenizer, whole[len(prompt) :])
    return _labelled(example.id, ids[:max_length], first=len(prompt_ids))


def _labelled(id: str, ids: list[int], *, first: int) -> Encoded | None:
    """Labels for the tokens from position `first` on, each at the position before it; None where there is
    none."""
    labels = [token if place >= first else IGNORED for place, token in enumerate(ids)][1:] + [IGNORED]
    supervised = sum(label != IGNORED for label in labels)
    return Encoded(id, ids, labels, supervised) if supervised else None


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> Encoded:
    rendered = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    ids = tokenizer(text, add_special_tokens=not rendered)["input_ids"][:max_length]
    return Encoded("", ids, (ids[1:] + [IGNORED])[: len(ids)], max(len(ids) - 1, 0))


def _up_to_token(end: Ending) -> str:
    return (
        end.text[: end.text.find(end.token)] + end.token if end.token in end.text else end.text.rstrip() + end.token
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
