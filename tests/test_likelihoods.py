"""Laws of likelihoods: the numbers are lm-eval's own, whatever texts share; what they share is read once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL_FAMILIES, VOCABULARY, WINDOW, adapt, build
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from test_decoding import state
from words import WORDS, tiny_llama, word_tokenizer

import sddx
from sddx.compression.remove import apply_cut
from sddx.errors import UserError
from sddx.evaluation import likelihoods as module
from sddx.evaluation.likelihoods import is_packable, likelihoods, packed_rows
from sddx.evaluation.prompts import SameTokensHFLM
from sddx.models.load import load_model, load_tokenizer
from sddx.records import Cut

pytestmark = pytest.mark.fast

CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"
WINDOWED = ("mistral", "qwen3", "gemma3")


def drawn(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(2, VOCABULARY), k=length)


def questions(longest: int = 30) -> list[tuple[list[int], list[int]]]:
    """Contexts that share examples, each with several continuations, of one token up to many; one is there twice,
    one begins another."""
    shots, asked = drawn(longest // 2, 0), []
    for seed in range(1, 5):
        context = shots[: 0 if seed == 4 else len(shots)] + drawn(longest // 4, seed)
        asked += [(context, drawn(size, 10 * seed + size)) for size in (1, 3, longest // 4)]
    return [*asked, asked[0], (asked[2][0], asked[2][1][:2]), (drawn(1, 9), drawn(2, 8))]


def alone(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By the definition: the whole text at once, log-softmax, sum."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        table = model(input_ids=ids[:, :-1]).logits[0, -len(continuation) :].float().log_softmax(-1)
    tokens = torch.tensor(continuation)
    return float(table.gather(1, tokens[:, None]).sum()), bool((table.argmax(-1) == tokens).all())


def require_same(model: Any, asked: list[tuple[list[int], list[int]]]) -> None:
    """Each likelihood is that of the text alone, and greedy is greedy."""
    texts = [(context + continuation)[:-1] for context, continuation in asked]
    assert is_packable(model, max(map(len, texts)))
    found = dict(likelihoods(model, [(text, pair[1]) for text, pair in zip(texts, asked, strict=True)]))
    assert sorted(found) == list(range(len(asked)))
    for number, pair in enumerate(asked):
        likely, is_greedy = alone(model, *pair)
        assert found[number][0] == pytest.approx(likely, rel=1e-5, abs=1e-5)
        assert found[number][1] == is_greedy


def with_greedy(model: Any, asked: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """And two continuations that the model itself would write."""
    made = []
    for context, _ in asked[:2]:
        ids = torch.tensor([context])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        made.append((context, written[0, len(context) :].tolist()))
    return [*asked, *made]


@pytest.mark.parametrize("family", sorted({*ALL_FAMILIES, "granite"} - {*WINDOWED, "mpt"}))
def test_likelihoods_are_those_of_each_text_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every family that is told places, also where rows are many and the head reads a few columns at a time."""
    model = build(family)
    asked = with_greedy(model, questions())
    require_same(model, asked)
    monkeypatch.setattr(module, "PASS_TOKENS", 40)
    monkeypatch.setattr(module, "ROW_TOKENS", 50)
    monkeypatch.setattr(module, "LOGITS", 3 * VOCABULARY)
    require_same(model, asked)


def test_adapters_pruned_models_and_eager_attention_are_judged_alike() -> None:
    """A peft model, one whose first block lost its attention, and one that attends by plain products."""
    require_same(adapt(build("llama")), questions())
    pruned = build("llama")
    apply_cut(pruned, Cut((0, 1, 3), 5, no_attention=(0,)))
    require_same(pruned, questions())
    eager = build("qwen3_moe")
    eager.set_attn_implementation("eager")
    require_same(eager, questions())


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_must_hold_the_whole_text(family: str) -> None:
    """A block that forgets is none for this path; while nothing is forgotten the numbers are right."""
    model = build(family)
    assert not is_packable(model, WINDOW)
    require_same(model, [([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([7, 8], [4, 5, 6])])


def test_places_must_be_told() -> None:
    """MPT finds them by counting columns, so texts cannot stand side by side."""
    assert not is_packable(build("mpt"), 30)


def test_shared_beginnings_stand_once() -> None:
    """A row of all questions to the same examples has each token of the tree of texts once, and sees along its
    branches alone."""
    texts = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 3], [1, 2, 7, 8]]
    (row,) = packed_rows(texts)
    assert len(row.tokens) == len({tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)})
    seen = row.seen(len(row.tokens) + 1)
    for number, text in enumerate(texts):
        columns = row.texts[number][0]
        assert [row.tokens[column] for column in columns] == text
        assert [row.places[column] for column in columns] == list(range(len(text)))
        for place, column in enumerate(columns):
            assert seen[column].nonzero()[:, 0].tolist() == sorted(columns[: place + 1])


def test_texts_that_share_little_stand_apart() -> None:
    """And rows are no longer than they may be, though long texts still find their like."""
    rows = packed_rows([[1, 2, 3, 4, 5, 6, 7, 8], [1, 9, 9, 9, 9, 9, 9, 9], [3] * 1500, [3] * 1500, [3, 4] * 500])
    assert sorted(len(row.tokens) for row in rows) == [8, 8, 1000, 1500]
    many = packed_rows([[5] * 300 + [number] * 200 for number in range(6, 12)])
    assert [len(row.tokens) for row in many] == [900, 900]


class Hook:
    """lm-eval's hook, which is told each answer as it comes."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.told.append((kind, request, answer))


def close(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [answer[1] for answer in found] == [answer[1] for answer in expected]
    for (mine, _), (theirs, _) in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("longest", [None, 12])
def test_answers_are_those_of_lm_eval(longest: int | None) -> None:
    """The embedded model, in float32, through lm-eval's own entry: answers in the order of the requests, each told
    to the hook once, contexts that are too long cut on the left."""
    model, tokenizer = load_model(CHECKPOINT), load_tokenizer(CHECKPOINT)
    pairs = [
        (f"What is {n} plus {n}? The answer is", f" {answer}") for n in range(4) for answer in ("4.", "no", "16")
    ]
    asked = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    how: dict[str, Any] = {"softmax_dtype": "float32", "max_length": longest, "batch_size": 3}
    lm, hook = SameTokensHFLM(pretrained=model, tokenizer=tokenizer, **how), Hook()
    lm.cache_hook = hook  # type: ignore[assignment]
    found = lm.loglikelihood(asked, disable_tqdm=True)
    close(found, HFLM(pretrained=model, tokenizer=tokenizer, **how).loglikelihood(asked, disable_tqdm=True))
    assert sorted(hook.told) == sorted(
        ("loglikelihood", pair, answer) for pair, answer in zip(pairs, found, strict=True)
    )


def test_rolling_likelihoods_are_those_of_lm_eval() -> None:
    """Windows of longer texts, which have no request of their own."""
    model, tokenizer = tiny_llama().float(), word_tokenizer()
    texts = [" ".join(random.Random(seed).choices(WORDS, k=90)) for seed in range(3)]
    asked = [Instance("loglikelihood_rolling", {}, (text,), place) for place, text in enumerate(texts)]
    lm = SameTokensHFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32", batch_size=2)
    found = lm.loglikelihood_rolling(asked, disable_tqdm=True)
    lm._loglikelihood_tokens = lambda *given, **named: HFLM._loglikelihood_tokens(lm, *given, **named)  # type: ignore
    assert found == pytest.approx(lm.loglikelihood_rolling(asked, disable_tqdm=True), rel=1e-5)


@pytest.mark.parametrize(
    "longest, told", [(3, "has 4 tokens, and must have 1 to 3,"), (4, "has 0 tokens, .*1 more")]
)
def test_answers_without_tokens_or_longer_than_the_context_are_refused(longest: int, told: str) -> None:
    """Where all that fits is scored, one of as many tokens as the context included."""
    how: dict[str, Any] = {"softmax_dtype": "float32", "max_length": longest}
    lm = SameTokensHFLM(pretrained=build("llama"), tokenizer=word_tokenizer(), **how)
    fitting = [(("a", "b"), [1, 2], [3] * size) for size in range(1, longest + 1)]
    found = lm._loglikelihood_tokens(fitting, True)
    close(found, HFLM._loglikelihood_tokens(lm, fitting, True))
    wrong = [[3] * 4] if longest == 3 else [[], []]
    with pytest.raises(UserError, match=f"The answer 'b' to 'a' {told}"):
        lm._loglikelihood_tokens([*fitting, *((("a", "b"), [1, 2], each) for each in wrong)], True)


def test_other_models_are_judged_by_lm_eval() -> None:
    """Where texts cannot stand side by side the answers are lm-eval's to the last bit, and where they can the model
    is left as it was."""
    tokenizer, model = word_tokenizer(), build("mpt")
    requests = [(("", ""), context, continuation) for context, continuation in questions(20)]
    lm = SameTokensHFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32")
    assert lm._loglikelihood_tokens(requests, True) == HFLM._loglikelihood_tokens(lm, requests, True)
    lm = SameTokensHFLM(pretrained=build("llama"), tokenizer=tokenizer, softmax_dtype="float32")
    before = state(lm.model)
    close(lm._loglikelihood_tokens(requests, True), HFLM._loglikelihood_tokens(lm, requests, True))
    assert state(lm.model) == before
