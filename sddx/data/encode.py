"""From text to token ids and labels. All rendering, masking and shifting of labels happens here and nowhere else,
so that a text is the same tokens wherever it is read: in scoring, self-data, training and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence

from sddx.errors import UserError
from sddx.records import Batch, Example, Guided, Packed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

IGNORED = -100
# How texts are read, for scoring, for patches and for held-out measures: so many at once, cut at so many tokens.
TEXT_BATCH, TEXT_LENGTH, TEXT_TOKENS = 32, 2048, 16_384
SIDE_BY_SIDE = 1000  # texts that are rendered and tokenised in one call: faster than alone, in little memory

# Some chat templates think aloud, or print today's date, unless told otherwise: answers are trained, written and
# evaluated without thinking, and the same text is rendered on every day. Other templates ignore these names.
TEMPLATE_SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}

ALTERED = (
    "the chat template would change the answer (as one that drops what stands before </think> does). What is "
    "trained is the row's own text."
)
SPECIAL = "prompt or answer hold special tokens of the tokenizer, which are read as such."
CUT = "longer than max_length={}. What is left of an answer has no end, so that a model learns to go on from it."
DROPPED = "dropped: max_length={} leaves nothing of the answer."


@dataclass(frozen=True)
class Encoded:
    """One example as tokens: `labels[t]` is the token that position t must predict, or -100; `supervised`
    counts the labels that are trained. `shown` is the prompt that a teacher reads, where it is another one."""

    id: str
    input_ids: list[int]
    labels: list[int]
    supervised: int
    shown: Sequence[int] = ()

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first one that is a label."""
        first = next(place for place, label in enumerate(self.labels) if label != IGNORED)
        return self.input_ids[: first + 1]

    def answered(self, tokens: Sequence[int]) -> Encoded:
        """The same prompts with these tokens, of which there are some, as the answer: all of them are labels."""
        first = len(self.prompt)
        ids = [*self.input_ids[:first], *tokens]
        labels = [IGNORED] * (first - 1) + [*tokens, IGNORED]
        return replace(self, input_ids=ids, labels=labels, supervised=len(tokens))

    def for_teacher(self) -> Encoded:
        """The same answer and labels behind the prompt that a teacher reads."""
        first = len(self.prompt)
        ids = [*self.shown, *self.input_ids[first:]]
        labels = [IGNORED] * (len(self.shown) - 1) + self.labels[first - 1 :]
        return replace(self, input_ids=ids, labels=labels, shown=())


@dataclass(frozen=True)
class Ending:
    """How the assistant's turn ends in a chat template: all text after an answer, and its end token; and what the
    template writes between the prompt and an answer."""

    text: str
    token: str
    lead: str = ""

    @property
    def trained(self) -> str:
        """The text after an answer up to and including its end token, which is put there where there is none."""
        before, _, _ = self.text.partition(self.token)
        return (before if self.token in self.text else self.text.rstrip()) + self.token


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """The tokens of each text, plain or rendered by a chat template, as the model is to read it.

    What the tokenizer puts before a text, its begin token, stands there once, whether or not the template writes it
    too: a model whose tokenizer puts one has hardly seen a text without. (lm-eval and llama.cpp do the same;
    transformers' and vLLM's chats take the template as it is.) What the tokenizer puts after a text is left out: an
    end token there would end the prompt before it is answered.
    """
    begin, _ = around(tokenizer)
    rows = [row for part in _parts([*texts]) for row in tokenizer(part, add_special_tokens=False)["input_ids"]]
    return [row if row[: len(begin)] == begin else begin + row for row in rows]


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that goes on another one: nothing is put before it or after it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer by itself puts before a text, and what after it."""
    bare, whole = plain_ids(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    places = range(len(whole) - len(bare) + 1)
    at = next((place for place in places if whole[place : place + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a tokenizer without a chat template, and for one with several of which none is the
    default."""
    name, template = tokenizer.name_or_path or type(tokenizer).__name__, tokenizer.chat_template
    if not template:
        raise UserError(
            f"The tokenizer has no chat template, so prompts and answers cannot be told apart. Given: {name}. "
            "Choose an instruction-tuned model, or put a chat_template into the model folder (chat_template.jinja)."
        )
    if isinstance(template, dict) and "default" not in template:
        raise UserError(
            f"The tokenizer has several chat templates and none is named default. Given: {name} with "
            f"{', '.join(sorted(template))}. Put the one to use into the model folder as chat_template.jinja."
        )


def render(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str | None = None) -> str:
    """The chat template's text of one user turn, up to where the answer begins, or with the answer and all
    that the template puts after it. Raises UserError as `conversation` does."""
    return conversation(tokenizer, _turns(prompt, response))


def _turns(prompt: str, response: str | None = None) -> list[dict[str, str]]:
    answer = [] if response is None else [{"role": "assistant", "content": response}]
    return [{"role": "user", "content": prompt}, *answer]


def conversation(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], *, unfinished: bool = False
) -> str:
    """The chat template's text of turns, each with `role` and `content`, up to where an answer begins unless the
    last turn is the assistant's; where that is `unfinished`, up to the end of its content. Raises UserError as
    `require_template` does, and where the template does not render them."""
    return _conversations(tokenizer, [turns], unfinished)[0]


def _conversations(
    tokenizer: PreTrainedTokenizerBase, several: Sequence[Sequence[Mapping[str, str]]], unfinished: bool = False
) -> list[str]:
    """The texts of several such conversations, whose last turns are all of one role."""
    require_template(tokenizer)
    try:
        return _rendered(tokenizer, several, unfinished)
    except TemplateError as error:
        raise UserError(
            f"The chat template does not render {_roles(several[0])}: {type(error).__name__}: {error}. Use the "
            "template that belongs to the model."
        ) from error


def _roles(turns: Sequence[Mapping[str, str]]) -> str:
    return "a user's turn" if len(turns) == 1 else f"turns of {', '.join(turn['role'] for turn in turns)}"


def _rendered(
    tokenizer: PreTrainedTokenizerBase, several: Sequence[Sequence[Mapping[str, str]]], unfinished: bool = False
) -> list[str]:
    if not several:
        return []
    asked = {"add_generation_prompt": several[0][-1]["role"] != "assistant", "continue_final_message": unfinished}
    turns = [[*each] for each in several]
    return list(tokenizer.apply_chat_template(turns, tokenize=False, **asked, **TEMPLATE_SETTINGS))


def require_system_turn(tokenizer: PreTrainedTokenizerBase, tasks: Iterable[str]) -> None:
    """Raises UserError where the chat template drops a system turn, or refuses one, and `tasks`, if there are any,
    put their description into it: lm-eval would go on without, with a warning at most."""
    system, refusal, text = "Answer in one word.", "", ""
    if not (described := ", ".join(tasks)):
        return
    try:
        asked = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
        (text,) = _rendered(tokenizer, [asked])
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
    lead, _, text = whole[len(start) :].rpartition(answer)
    tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    places = [(text.index(token), -len(token), token) for token in tokens if token in text]
    if places:
        return Ending(text, min(places)[2], lead)
    if tokenizer.eos_token is None:
        raise UserError(
            f"Nothing ends an answer: the chat template writes {text!r} after it and the tokenizer has no "
            "end-of-sequence token. Set eos_token in the model folder's tokenizer_config.json."
        )
    return Ending(text, str(tokenizer.eos_token), lead)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up a batch; it is never attended, so any will do where the tokenizer has none."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, *, max_length: int) -> Encoded | None:
    """One example as tokens, up to and including the token that ends the answer.

    The prompt is masked; the answer and its end token are labels, and so is what the template writes between the
    place where an answer is asked for and the answer, since the model is to write that too. The answer stands in
    the template's frame as the row has it: a template may trim the white space around it, and whatever else it
    would change is not followed. Tokens beyond `max_length` are cut off; None where no label is left (such rows are
    counted and dropped, see `encode_all`). Raises UserError as `render` and `ending` do.
    """
    return _encoded(tokenizer, [example], ending(tokenizer), max_length)[0].row


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    *,
    max_length: int,
    tell: bool = True,
    shown: Callable[[Example], str] | None = None,
) -> tuple[list[Encoded], int]:
    """All examples that have a label left, in order, and the number of those dropped because they have none. What
    the template would have changed, special tokens within rows, and what `max_length` takes are told where `tell`
    asks for it. `shown`
    gives the prompt that a teacher reads, where it is another one. Raises UserError as `encode` does."""
    end, examples = ending(tokenizer), list(examples)
    encoded = [row for part in _parts(examples) for row in _encoded(tokenizer, part, end, max_length)]
    if tell:
        _tell(tokenizer, examples, encoded, max_length)
    kept = [(example, each.row) for example, each in zip(examples, encoded, strict=True) if each.row is not None]
    rows = [row for _, row in kept]
    if shown is not None:
        prompts = prompts_of(tokenizer, [replace(example, prompt=shown(example)) for example, _ in kept])
        rows = [replace(row, shown=prompt) for row, prompt in zip(rows, prompts, strict=True)]
    return rows, len(examples) - len(rows)


def _tell(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], encoded: Sequence[_Told], max_length: int
) -> None:
    """Log which rows the template would have changed, which hold special tokens, and which are too long."""
    tokens = [token for token in tokenizer.all_special_tokens if token]
    pairs = list(zip(examples, encoded, strict=True))
    told = {
        ALTERED: [row.id for row, each in pairs if each.own],
        SPECIAL: [row.id for row in examples if any(token in row.prompt + row.response for token in tokens)],
        CUT.format(max_length): [row.id for row, each in pairs if each.cut and each.row],
        DROPPED.format(max_length): [row.id for row, each in pairs if not each.row],
    }
    for message, ids in told.items():
        if ids:
            _log.warning("%d of %d rows: %s The first: %s.", len(ids), len(examples), message, ids[0])


def require_trainable(tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], max_length: int) -> None:
    """Raises UserError where no row has a label within `max_length` tokens, and as `encode` does. Looks no further
    than the first row that has."""
    end, rows = ending(tokenizer), list(examples)
    if rows and not any(_encoded(tokenizer, [row], end, max_length)[0].row for row in rows):
        shortest = min(map(len, prompts_of(tokenizer, rows)))
        raise UserError(
            f"No row has an answer left to train on after truncation. Given: {len(rows)} rows, whose shortest "
            f"prompt has {shortest} tokens, and max_length={max_length}. Raise max_length above the length of the "
            "prompts."
        )


def prompts_of(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Example]) -> list[list[int]]:
    """The tokens of the rows' prompts in the model's form, up to where the answers begin."""
    return token_ids(tokenizer, _conversations(tokenizer, [_turns(row.prompt) for row in rows]))


def fitting(context: int | None, prompts: Sequence[Sequence[int]], new: int, setting: str) -> list[Sequence[int]]:
    """The prompts that leave room for so many tokens. Raises UserError (lower this setting) where none does."""
    short = [prompt for prompt in prompts if len(prompt) + new <= (context or float("inf"))]
    if not short:
        raise UserError(
            f"No held-out prompt leaves room for {new} tokens in the model's context of {context}. Lower {setting}."
        )
    return short


def collate(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Rows side by side, padded on the right to the longest: [batch, time], padding unattended and
    unlabelled; with what a teacher reads of them where that is something else."""
    width = max(len(row.input_ids) for row in rows)
    batch = Batch(
        torch.tensor([row.input_ids + [pad_id] * (width - len(row.input_ids)) for row in rows]),
        torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows]),
        torch.tensor([row.labels + [IGNORED] * (width - len(row.labels)) for row in rows]),
    )
    if not rows[0].shown:
        return batch
    return Guided(**vars(batch), shown=collate([row.for_teacher() for row in rows], pad_id))


def pack(rows: Sequence[Encoded]) -> Packed:
    """Rows one after the other in a flat one: [1, tokens]. The last token of a row has no label, so that no row
    predicts the next."""
    ids, labels, positions = (
        torch.tensor([[each for row in rows for each in of(row)]])
        for of in (lambda row: row.input_ids, lambda row: row.labels, lambda row: range(len(row.input_ids)))
    )
    return Packed(ids, torch.ones_like(ids), labels, positions)


def text_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = TEXT_LENGTH,
    context: int | None = None,
    batch_size: int = TEXT_BATCH,
) -> Iterator[Batch]:
    """Calibration texts in their order, cut at `max_length` tokens, and at the model's `context` where that is
    shorter; every attended token but the first is a label. A batch has at most `batch_size` texts and, of more than
    one text, TEXT_TOKENS padded tokens: the states of all blocks are held for it.

    Texts are encoded by `token_ids`; those without a token are left out. Raises UserError where none has one.
    """
    length = min(max_length, context or max_length)
    rows = [_of_text(ids[:length]) for ids in token_ids(tokenizer, texts) if ids]
    if not rows:
        raise UserError(
            f"The calibration texts hold no token. Given: {len(texts)} texts, max_length {max_length}. "
            "Choose another column or file."
        )
    spans = text_spans([len(row.input_ids) for row in rows], batch_size)
    return (collate(rows[first:end], padding_id(tokenizer)) for first, end in spans)


def by_length(batches: Sequence[Batch], batch_size: int = TEXT_BATCH) -> Iterator[tuple[list[int], Batch]]:
    """The rows of batches put together anew, those of like length side by side, so that little padding is read: the
    place of each row among all, and the batch. For what hangs on no order."""
    rows = [
        Batch(*(part[row, kept] for part in vars(batch).values()))
        for batch in batches
        for row, kept in enumerate(batch.attention_mask.bool())
    ]
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].input_ids))
    for first, end in text_spans([len(rows[place].input_ids) for place in order], batch_size):
        places = order[first:end]
        columns = zip(*(vars(rows[place]).values() for place in places), strict=True)
        ids, mask, labels = (pad_sequence([*column], batch_first=True) for column in columns)
        yield places, Batch(ids, mask, labels.masked_fill(mask == 0, IGNORED))


def text_spans(lengths: Sequence[float], batch_size: int = TEXT_BATCH) -> list[tuple[int, int]]:
    """The batches of texts of these lengths, each as (first, one past the last)."""
    spans, first = [], 0
    for place in range(1, len(lengths) + 1):
        more = place < len(lengths) and place - first < batch_size
        if not more or max(lengths[first : place + 1]) * (place + 1 - first) > TEXT_TOKENS:
            spans.append((first, place))
            first = place
    return spans


def _parts(texts: list[Any]) -> Iterator[list[Any]]:
    return (texts[first : first + SIDE_BY_SIDE] for first in range(0, len(texts), SIDE_BY_SIDE))


class _Told(NamedTuple):
    """A row as tokens (None: no label is left), whether its answer stands there against the template, and whether
    it is cut."""

    row: Encoded | None
    own: bool
    cut: bool


def _encoded(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], end: Ending, max_length: int
) -> list[_Told]:
    """The rows, and what is to be told of each."""
    prompts = _conversations(tokenizer, [_turns(row.prompt) for row in examples])
    wholes = _conversations(tokenizer, [_turns(row.prompt, row.response) for row in examples])
    answers = [_answer(*each, end) for each in zip(wholes, prompts, examples, strict=True)]
    turns = [end.lead + answer + end.trained for answer, _ in answers]
    before = token_ids(tokenizer, prompts)
    through = token_ids(tokenizer, map("".join, zip(prompts, turns, strict=True)))
    for row, (ids, turn) in enumerate(zip(before, turns, strict=True)):
        if through[row][: len(ids)] != ids:
            # The tokenizer merges across the boundary; a model that answers never sees that merge.
            through[row] = ids + plain_ids(tokenizer, turn)
    return [
        _Told(_labelled(example.id, ids[:max_length], first=len(start)), own, len(ids) > max_length)
        for example, ids, start, (_, own) in zip(examples, through, before, answers, strict=True)
    ]


def _answer(whole: str, prompt: str, example: Example, end: Ending) -> tuple[str, bool]:
    """The answer as the template writes it into the `whole` conversation, where that is the row's but for white
    space around it; else the row's own, and that it is."""
    own, before = example.response.strip(), prompt + end.lead
    written = whole.removeprefix(before).removesuffix(end.text)
    same = whole.startswith(before) and whole.endswith(end.text) and written.strip() == own
    return (written, False) if same else (own, True)


def _labelled(id: str, ids: list[int], *, first: int) -> Encoded | None:
    """Labels for the tokens from position `first` on, each at the position before it; None where there is
    none."""
    labels = ([IGNORED] * min(first, len(ids)) + ids[first:])[1:] + [IGNORED]
    supervised = len(labels) - labels.count(IGNORED)
    return Encoded(id, ids, labels, supervised) if supervised else None


def _of_text(ids: list[int]) -> Encoded:
    return Encoded("", ids, (ids[1:] + [IGNORED])[: len(ids)], max(len(ids) - 1, 0))
