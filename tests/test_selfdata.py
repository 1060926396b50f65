"""Laws of self-data: who writes an answer, what is kept of it, and that neighbours change nothing."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from composing import SMALL, composed, resolve
from test_data import real_file
from words import tiny_llama, word_tokenizer

import sddx
from sddx.data import checkers
from sddx.data.encode import render
from sddx.data.selfdata import (
    CUT_OFF,
    REASONS,
    TOO_LONG,
    Answer,
    Rewrite,
    _sampling,
    acceptance,
    distil,
    end_ids,
    judge,
    write_answers,
)
from sddx.data.shards import read_examples, read_rows, write_rows
from sddx.data.sources import pinned
from sddx.errors import UserError
from sddx.pipeline import Run
from sddx.records import Example
from sddx.runtime import Runtime
from sddx.stages.distill.run import distill
from sddx.stages.inputs import read_by
from sddx.stages.prepare.run import prepare
from sddx.stages.select.run import select
from sddx.store import Store
from sddx.train import method, verify

CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"

PROMPTS = [
    "what ?",
    "how many apples are there ?",
    "what is 1 plus 2 ?",
    "the answer is the answer is the answer is what ?",
    "a b c d",
    "what is 7 minus 3 plus 1 minus 1 ?",
    "9",
]
GREEDY = {"max_new_tokens": 12, "batch_size": 3, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}
SAMPLED = GREEDY | {"temperature": 0.95, "top_p": 0.7, "top_k": 20}


def talkative():
    """A random model and its tokenizer, where a few words end an answer, so that answers differ in length."""
    tokenizer, model = word_tokenizer(), tiny_llama()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<end>", "7", "b", "is", "many"])
    return partial(write_answers, model, tokenizer)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_neighbours_do_not_change_a_row(settings: dict) -> None:
    """Each prompt alone, in other batches and in another order gets the same answer, in the order of the
    prompts."""
    write = talkative()
    together = write(PROMPTS, **settings)
    assert together == [write([prompt], **settings)[0] for prompt in PROMPTS]
    assert together == write(PROMPTS[::-1], **(settings | {"batch_size": 7}))[::-1]
    assert len({answer.text for answer in together}) > 3
    assert "" in {answer.fault for answer in together} <= {"", CUT_OFF}


def test_an_answer_that_has_not_ended_says_so() -> None:
    """With little room an answer is either whole, as with more room, or a marked beginning."""
    write = talkative()
    short, long = (write(PROMPTS, **(GREEDY | {"max_new_tokens": room})) for room in (3, 12))
    assert {answer.fault for answer in short} == {"", CUT_OFF}
    for brief, full in zip(short, long, strict=True):
        assert full.text.startswith(brief.text) if brief.fault else brief == full


def test_greedy_equals_a_loop_without_cache_or_padding() -> None:
    """The written tokens are the arg-max continuation, computed here one whole forward pass at a time; the
    generation settings that came with the model do not count."""
    tokenizer, model = word_tokenizer(), tiny_llama()
    ids = tokenizer(render(tokenizer, PROMPTS[2]), add_special_tokens=False)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 12 and ids[-1] not in end_ids(model, tokenizer):
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    model.generation_config.update(repetition_penalty=3.0, temperature=0.1, do_sample=True, top_k=3)
    (answer,) = write_answers(model, tokenizer, [PROMPTS[2]], **GREEDY)
    assert answer.text == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_samples_hang_on_the_seed_alone() -> None:
    """Same seed, same answers; another seed, others; equal prompts get equal answers."""
    write = talkative()
    first = write(PROMPTS, **SAMPLED)
    torch.manual_seed(123)
    assert write(PROMPTS, **SAMPLED) == first
    assert write(PROMPTS, **(SAMPLED | {"seed": 1})) != first
    twins = write([PROMPTS[0], PROMPTS[1], PROMPTS[0]], **SAMPLED)
    assert twins[0] == twins[2] == first[0]


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.5, 0.8, 0), (2.0, 1.0, 3)])
def test_sampling_draws_from_the_filtered_distribution(temperature: float, top_p: float, top_k: int) -> None:
    """Over evenly spread uniform numbers each token is drawn in proportion to its probability, which is
    computed here by sorting: softmax at the temperature, the likeliest tokens, renormalised."""
    logits = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.0], dtype=torch.float64)
    draws = 4000
    uniforms = ((torch.arange(draws, dtype=torch.float64) + 0.5) / draws)[:, None]
    choose = _sampling(uniforms, 3, temperature, top_p, top_k)
    chosen = choose(torch.zeros(draws, 3, dtype=torch.long), logits.expand(draws, -1).clone()).argmax(-1)
    drawn = torch.bincount(chosen, minlength=5) / draws

    order = logits.argsort(descending=True)[: top_k or None]
    kept = (logits[order] / temperature).softmax(0)
    kept = kept[: int((kept.cumsum(0) < top_p).sum()) + 1 if top_p < 1 else None]
    expected = torch.zeros(5, dtype=torch.float64)
    expected[order[: len(kept)]] = kept / kept.sum()
    assert torch.allclose(drawn.double(), expected, atol=2 / draws)


def test_long_prompts_are_refused_and_all_rows_are_reported() -> None:
    """A prompt that leaves no room in the context is not cut but refused, and progress counts every row
    once."""
    tokenizer, model = word_tokenizer(), tiny_llama()
    done: list[int] = []
    answers = write_answers(model, tokenizer, ["what " * 50, *PROMPTS], done.append, **GREEDY)
    assert answers[0] == Answer("", TOO_LONG)
    assert answers[1:] == write_answers(model, tokenizer, PROMPTS, **GREEDY)
    assert sum(done) == len(answers)


REAL = {
    "gsm8k": ("gsm8k_train.jsonl", checkers.math_answer),
    "alpaca": ("alpaca_train.json", checkers.none),
    "dolly": ("dolly_train.json", checkers.none),
}


def head(path: Path, name: str, count: int) -> str:
    """A file with the shortest rows of a real one: the embedded model's context is small."""
    text = Path(real_file(name)).read_text()
    rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    rows = sorted(rows, key=lambda row: sum(map(len, row.values())))[:count]
    path.write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("dataset", REAL)
def test_real_rows_are_distilled_from_a_local_file(dataset: str, tmp_path: Path) -> None:
    """prepare and distill on rows in each published format, by the embedded model: every row comes back once, in
    its order, with its reference and either the model's own answer or the reason why not."""
    name, check = REAL[dataset]
    given = [f"dataset={dataset}", f"dataset.data_files={head(tmp_path / name, name, 6)}", "dataset.size=4"]
    if dataset == "dolly":  # this copy has Alpaca's columns
        given += ["dataset.prompt='{instruction} {input}'", "dataset.response=output"]
    with composed(*given, "generation.max_new_tokens=8") as cfg:
        config = resolve(cfg)
    quiet, store = Runtime(quiet=True), Store(tmp_path / "store")
    (file,) = files = read_by(store, pinned(config["dataset"]))
    assert file.path == tmp_path / name
    data = store.build(prepare, {"files": files}, runtime=quiet, dataset=config["dataset"], validation=2)
    (shard,) = sorted((data.path / "shards").iterdir())
    asked = {"rewrite": config["dataset"]["rewrite"], "generation": config["generation"], "guided": True}
    inputs = {"base": store.source("model", CHECKPOINT), "shard": store.source("rows", shard)}
    answers = store.build(distill, inputs, runtime=quiet, **asked, dtype="float32", attention="sdpa")
    inputs = {"shard": inputs["shard"], "answers": answers}
    selected = store.build(select, inputs, runtime=quiet, check=config["dataset"]["check"])
    rewrites = read_rows(Rewrite, selected.path / "rewrites.jsonl")

    examples = [*read_examples(data.path / "validation.jsonl"), *read_examples(shard)]
    assert len({e.id for e in examples}) == 6 and {e.origin for e in examples} == {"reference"}
    assert [(r.id, r.prompt, r.reference) for r in rewrites] == [(e.id, e.prompt, e.response) for e in examples[2:]]
    assert all("####" in e.response for e in examples) == (dataset == "gsm8k")
    assert {r.reason for r in rewrites} <= {"", *REASONS} - {TOO_LONG}
    assert any(not r.reason for r in rewrites) == (dataset != "gsm8k")  # nobody expects the tiny model to be right
    assert all(not r.reason or r.reason != "wrong answer" or not check(r.answer, r.reference) for r in rewrites)
    for row, rewrite in zip(distil(rewrites, fallback="reference"), rewrites, strict=True):
        refused = (rewrite.reference, "reference", rewrite.reason)
        assert (row.response, row.origin, row.note) == (refused if rewrite.reason else (rewrite.answer, "self", ""))


def test_another_check_writes_nothing_anew(tmp_path: Path) -> None:
    """Answers are known by what wrote them, and what may be trained on by its check as well."""
    short = ("dataset.size=4", "validation=2", "generation.max_new_tokens=4")
    store, seen = Store(tmp_path / "store"), {}
    for check in ("dataset", "none"):
        given = ("loss=sdd", *short, f"selfdata.check={check}")
        with composed(*given) as cfg:
            seen[check] = Run(store, Runtime(quiet=True), method(resolve(cfg)))
        assert len(seen[check].rows) == len(seen[check].answers) == 2
    first, second = seen.values()
    assert first.answers == second.answers and not set(first.rows) & set(second.rows)
    assert [row.stage for row in first.rows] == ["select"] * 2


def test_whose_references_are_shown_counts_where_any_are(tmp_path: Path) -> None:
    """Not in prompts without references, nor for no rows."""
    short = ("dataset.size=4", "validation=0", "generation.max_new_tokens=4")
    store, seen = Store(tmp_path / "store"), {}
    for loss in ("sdd", "sdd_plain"):
        for reference in ("right", "wrong"):
            with composed(f"loss={loss}", *short, f"selfdata.reference={reference}") as cfg:
                seen[loss, reference] = Run(store, Runtime(quiet=True), method(resolve(cfg))).answers
    assert seen["sdd_plain", "right"] == seen["sdd_plain", "wrong"]
    (none, right), (again, wrong) = seen["sdd", "right"], seen["sdd", "wrong"]
    assert none == again and right != wrong


WRONG = ("selfdata.reference=wrong", "selfdata.check=none")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["loss=sft", *WRONG], "there are none with loss.data=reference. Use loss=sdd, or"),
        (["loss=sdd_plain", *WRONG], "there are none with loss.data=self_plain"),
        (["loss=sdd", WRONG[0]], r"compares the answer with the row's own \(last_number\), which would refuse"),
        (["loss=sdd", *WRONG, "dataset.size=257"], "dataset.size=257 leaves one row alone in its shard"),
        (["loss=sdd", *WRONG, "validation=1"], "validation=1 leaves one row alone in its shard"),
        (["loss=sdd", "generation.max_new_tokens=500"], "No prompt leaves room for generation.max_new_tokens=500"),
        (["loss=sdd_plain", "generation.max_new_tokens=500"], "in 512 tokens, so that the model would write"),
    ],
)
def test_self_data_that_cannot_be_written_is_refused_before_work(given: list[str], said: str) -> None:
    with composed(*SMALL, *given) as cfg, pytest.raises(UserError, match=said):
        verify(resolve(cfg))


def example(id: str) -> Example:
    return Example(id, f"prompt {id}", "1 + 2 = 3\n#### 3")


EXAMPLES = [example(id) for id in "abcdef"]
ANSWERS = [
    Answer("It is 3."),
    Answer("It is 4."),
    Answer("As the reference answer says: 3"),
    Answer("It is 3 and", CUT_OFF),
    Answer(""),
    Answer("3.0"),
]
REWRITES = judge(EXAMPLES, ANSWERS, check=checkers.last_number, template="math")


def test_a_wrong_rewrite_falls_back_to_the_reference() -> None:
    """Ids, prompts and order are kept; an accepted answer is `self`; every refused one gives way to the
    reference and says why."""
    examples = distil(REWRITES, fallback="reference")
    assert [(e.id, e.prompt) for e in examples] == [(e.id, e.prompt) for e in EXAMPLES]
    assert [e.note for e in examples] == ["", "wrong answer", "leak", CUT_OFF, "empty", ""]
    for row, answer, source in zip(examples, ANSWERS, EXAMPLES, strict=True):
        kept = (source.response, "reference") if row.note else (answer.text, "self")
        assert (row.response, row.origin) == kept


def test_what_saw_no_reference_gives_none_away() -> None:
    """An answer in the words of a template that was not shown is as good as any."""
    unguided = judge(EXAMPLES, ANSWERS, check=checkers.last_number)
    assert [row.reason for row in unguided] == ["", "wrong answer", "", CUT_OFF, "empty", ""]


def test_dropping_leaves_the_accepted_rows_only() -> None:
    """With `drop` the refused rows are gone from training but still counted, and the rest is unchanged."""
    dropped = distil(REWRITES, fallback="drop")
    assert dropped == [e for e in distil(REWRITES, fallback="reference") if e.origin == "self"]
    assert acceptance(REWRITES) == {
        "examples": 6,
        "accepted": 2,
        "empty": 1,
        CUT_OFF: 1,
        TOO_LONG: 0,
        "leak": 1,
        "wrong answer": 1,
    }
    assert distil([rewrite for rewrite in REWRITES if rewrite.reason], fallback="drop") == []


def test_every_row_needs_its_answer() -> None:
    """A missing answer is an error, never a silent shift of answers against examples."""
    with pytest.raises(ValueError):
        judge(EXAMPLES, ANSWERS[:-1], check=checkers.none)


def test_refused_answers_are_kept_for_the_report(tmp_path: Path) -> None:
    """Rewrites come back from disk as they were, the refused answers' texts among them."""
    write_rows(REWRITES, tmp_path / "rewrites.jsonl")
    assert read_rows(Rewrite, tmp_path / "rewrites.jsonl") == REWRITES
    assert REWRITES[1].answer == "It is 4." and REWRITES[1].reference == EXAMPLES[1].response
