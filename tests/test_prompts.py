"""Laws of prompts: a text is the same tokens wherever it is read, greedy is greedy, and what evaluates a model
leaves it as it is."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import SMALL, composed, resolve
from families import build as of_family
from tokenizers import Tokenizer, models, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from words import SPECIAL, WORDS, tiny_llama, word_tokenizer

import sddx
from sddx.data.encode import IGNORED, encode, encode_all, ending, render, text_batches, token_ids
from sddx.data.selfdata import write_answers
from sddx.engines.writing import Writer
from sddx.errors import UserError
from sddx.estimate.skeleton import skeleton
from sddx.evaluation.harness import evaluate
from sddx.evaluation.prompts import Fitting, Reader, SameTokensHFLM
from sddx.export.command import lm_eval
from sddx.models import decoding
from sddx.models.anatomy import decoder
from sddx.models.load import (
    context_of,
    frozen_model,
    load_model,
    load_tokenizer,
    require_embedded,
    require_one_head,
    text_config,
)
from sddx.models.outputs import run as run_model
from sddx.records import Example
from sddx.report import table
from sddx.runtime import Runtime
from sddx.train import run

CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"
QUIET = Runtime(quiet=True)
BEGIN, END = SPECIAL.index("<start>"), SPECIAL.index("<end>")
TURNS = (
    "{% for m in messages %} <{{ m.role }}> {{ m.content }}{% if m.role == 'assistant' %}$E{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
TEMPLATES = {
    "neither": TURNS.replace("$E", ""),
    "begin": "<start>" + TURNS.replace("$E", ""),
    "end": TURNS.replace("$E", " <end>"),
    "both": "<start>" + TURNS.replace("$E", " <end>"),
}
ADDS = {"neither": "$A", "begin": "<start> $A", "end": "$A <end>", "both": "<start> $A <end>"}
GREEDY = {"max_new_tokens": 6, "batch_size": 4, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}
TASKS = """
task: {name}
custom_dataset: !function sddx.evaluation.harness.json_lines
dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: question
doc_to_target: answer
{more}
metadata: {{version: 1.0, chance: 0.0}}
"""
GENERATED = (
    "generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"
)
CHOSEN = 'doc_to_choice: ["3 .", "a b"]\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]'
ROWS = [("what is 1 plus 2 ?", "3 ."), ("how many apples ?", "a b"), ("a b c", "3 .")]


def adding(kind: str, template: str = "neither") -> PreTrainedTokenizerFast:
    """The tokenizer of words that puts tokens around a text by itself."""
    tokenizer = word_tokenizer()
    single = processors.TemplateProcessing(single=ADDS[kind], special_tokens=[("<start>", BEGIN), ("<end>", END)])
    tokenizer._tokenizer.post_processor = single
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks on the same rows, of which one is generated; and a model's own config."""
    made = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "answer": answer} for question, answer in ROWS]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "written.yaml").write_text(TASKS.format(name="written", kind="generate_until", more=GENERATED))
    (made / "chosen.yaml").write_text(TASKS.format(name="chosen", kind="multiple_choice", more=CHOSEN))
    tiny_llama().save_pretrained(made / "model")
    return made


@contextmanager
def seen(model: LlamaForCausalLM) -> Iterator[list[list[int]]]:
    """What the model reads from its first token on, without padding. A text that others go on from counts as what
    they are; what proves that texts can be written side by side is left out."""
    found: list[list[int]] = []

    def note(module: Any, given: tuple, named: dict[str, Any]) -> None:
        rows, past = named["input_ids"].tolist(), named.get("past_key_values")
        if len(rows[0]) == 1 and past.get_seq_length():  # an answer's next token
            return
        before = getattr(past, "read", [])
        if before in found:
            found.remove(before)
        found.extend([*before, *(token for token in row if token != 0)] for row in rows)
        if past is not None:
            past.read = found[-1]

    handle = decoder(model).register_forward_pre_hook(note, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "holds", lambda *_: True)
        try:
            yield found
        finally:
            handle.remove()


def ids(text: str) -> list[int]:
    return [(SPECIAL + WORDS).index(word) for word in text.split()]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ADDS)
def test_a_prompt_is_the_same_tokens_everywhere(kind: str, template: str, folder: Path, monkeypatch) -> None:
    """In scoring, in self-data by either writer, in training and in evaluation by either backend: what the template
    writes, after one begin token where the template or the tokenizer puts one; no end token stands before the
    answer. Computed here word by word."""
    tokenizer, model = adding(kind, template), tiny_llama()
    begin = [BEGIN] if "begin" in (kind, template) or "both" in (kind, template) else []
    prompts = [begin + ids(f"<user> {question} <assistant>") for question, _ in ROWS]
    answers = [ids(answer) for _, answer in ROWS]

    with seen(model) as read:
        write_answers(model, tokenizer, [question for question, _ in ROWS], **GREEDY)
    assert sorted(read) == sorted(prompts)
    asked: list[list[int]] = []

    def written(self: Writer, folder: Path, given: Any, progress: Any) -> list[Any]:
        asked.extend(row for row, _ in given)
        return [([], "stop")] * len(given)

    monkeypatch.setattr(Writer, "_written", written)
    vllm = Writer(dtype="float64", **{name: value for name, value in GREEDY.items() if name != "batch_size"})
    vllm(folder / "model", tokenizer, [question for question, _ in ROWS])
    assert asked == prompts

    given = {"tasks": ["written", "chosen"], "include": str(folder), "batch_size": 1}
    with seen(model) as read:
        evaluate(model, tokenizer, QUIET, **given)
    assert all(prompt in read for prompt in prompts)
    choices = [ids("3 ."), ids("a b")]
    assert all((prompt + choice)[:-1] in read for prompt in prompts for choice in choices)
    reader = Reader(tokenizer, 64)
    rendered = [reader.apply_chat_template([{"role": "user", "content": question}]) for question, _ in ROWS]
    assert reader.tok_encode(rendered) == prompts

    for (question, answer), prompt, words in zip(ROWS, prompts, answers, strict=True):
        row = encode(tokenizer, Example("x", question, answer), max_length=64)
        assert row is not None and row.input_ids == [*prompt, *words, END]
        assert row.labels == [IGNORED] * (len(prompt) - 1) + [*words, END, IGNORED]
        (batch,) = text_batches(tokenizer, [render(tokenizer, question, answer)])
        assert batch.input_ids[0].tolist()[: len(prompt + words)] == prompt + words


@pytest.mark.parametrize("kind", ADDS)
def test_a_text_begins_as_the_tokenizer_begins_it_and_nothing_is_appended(kind: str) -> None:
    """A begin token that stands there already is not put again."""
    tokenizer = adding(kind)
    begin = [BEGIN] if kind in ("begin", "both") else []
    assert token_ids(tokenizer, ["a b", "<start> a"]) == [begin + ids("a b"), ids("<start> a")]


def test_a_pair_is_the_tokens_of_the_whole() -> None:
    """Also where the last word of the context and the first of the continuation are one token together."""
    inner = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3, " ": 4}, [("a", "b")]))
    reader = Reader(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="c"), 9)
    reader.prefix_token_id = 3
    for context, continuation, expected in [
        ("ba", "a", ([1, 0], [0])),
        ("ba", "b", ([1], [2])),
        ("a", "bc", ([3], [2, 3])),
        ("b ", "a", ([1], [4, 0])),  # white space goes to the continuation
    ]:
        assert reader._encode_pair(context, continuation) == expected


def test_the_command_lines_tokens_are_there_for_comparison(folder: Path) -> None:
    """`encoding=lm_eval`: the appended end token stands between prompt and answer, in place of the answer's first
    word, and the record tells the two apart. A tokenizer that appends nothing gives the same numbers bit for
    bit."""
    given = {"tasks": ["chosen"], "include": str(folder)}
    model = tiny_llama()
    for kind, alike in (("neither", True), ("begin", True), ("end", False)):
        ours, theirs = (
            evaluate(model, adding(kind), QUIET, encoding=encoding, **given)["tasks"]["chosen"]
            for encoding in ("same", "lm_eval")
        )
        likelihoods = [[sample["likelihoods"] for sample in found["samples"]] for found in (ours, theirs)]
        assert (likelihoods[0] == likelihoods[1]) == alike
        assert (ours["settings"]["encoding"], theirs["settings"]["encoding"]) == ("same", "lm_eval")
    with seen(model) as read:
        evaluate(model, adding("end"), QUIET, encoding="lm_eval", batch_size=1, **given)
    assert ids("<user> a b c <assistant> <end> .") in read


# Everything that a generation_config.json may hold against a greedy answer.
OWN = {
    "length": {"max_new_tokens": 2},
    "total length": {"max_length": 3},
    "least length": {"min_length": 60},
    "least new tokens": {"min_new_tokens": 6},
    "n-grams": {"no_repeat_ngram_size": 1},
    "penalty": {"repetition_penalty": 5.0},
    "forced": {"forced_eos_token_id": END, "forced_bos_token_id": 9},
    "suppressed": {"suppress_tokens": list(range(6, 40)), "begin_suppress_tokens": list(range(6, 30))},
    "banned": {"bad_words_ids": [[token] for token in range(6, 36)]},
    "biased": {"sequence_bias": [[[token], -50.0] for token in range(6, 36)]},
    "sampled": {"do_sample": True, "temperature": 3.0, "top_k": 3, "top_p": 0.5},
    "beams": {"num_beams": 4, "length_penalty": 2.0},
    "decay": {"exponential_decay_length_penalty": [1, 9.0]},
    "stopped": {"stop_strings": ["a", "b", "3"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[list, list]:
    return answers_of(tiny_llama(), folder)


def answers_of(model: LlamaForCausalLM, folder: Path, **how: str) -> tuple[list, list]:
    """What it writes as self-data, and to a task."""
    tokenizer = adding("neither")
    found = evaluate(model, tokenizer, QUIET, tasks=["written"], include=str(folder), **how)
    written = write_answers(model, tokenizer, [question for question, _ in ROWS], **GREEDY)
    return written, [sample["response"] for sample in found["tasks"]["written"]["samples"]]


@pytest.mark.parametrize("name", OWN)
def test_greedy_is_greedy_whatever_the_models_own_settings(name: str, folder: Path, plain: tuple) -> None:
    """Self-data and evaluation use none of them, and the model has them again afterwards."""
    model = tiny_llama()
    for setting, value in OWN[name].items():
        setattr(model.generation_config, setting, value)
    own, before = model.generation_config, model.generation_config.to_dict()
    assert answers_of(model, folder) == plain
    assert model.generation_config is own and own.to_dict() == before


def test_the_models_own_settings_are_there_for_comparison(folder: Path, plain: tuple) -> None:
    """`generation_config=model`: as lm-eval's command line has it, for evaluation alone."""
    model = tiny_llama()
    model.generation_config.update(max_new_tokens=2)
    written, answered = answers_of(model, folder, generation_config="model")
    assert written == plain[0]
    assert answered == [" ".join(answer.split()[:2]) for answer in plain[1]] != plain[1]


def test_end_tokens_are_the_models(folder: Path, plain: tuple) -> None:
    """They alone are taken from its settings."""
    model, (_, answered) = tiny_llama(), plain
    first = ids(answered[0])[1]
    model.generation_config.eos_token_id = [END, first]
    _, shorter = answers_of(model, folder)
    assert len(shorter[0].split()) == 2 < len(answered[0].split())


def test_what_evaluates_a_model_leaves_it_as_it_is(folder: Path) -> None:
    """Weights (each still in its place, tied or not), config, settings of generation, and the tokenizer's side."""
    for tied in (False, True):
        model, tokenizer = tiny_llama(tie_word_embeddings=tied), adding("both")
        held = {name: (id(weight), weight.clone()) for name, weight in model.named_parameters()}
        settings, side = (model.config.to_dict(), model.generation_config), tokenizer.padding_side
        evaluate(model, tokenizer, QUIET, tasks=["written", "chosen"], include=str(folder))
        for name, weight in model.named_parameters():
            assert id(weight) == held[name][0] and torch.equal(weight, held[name][1])
        assert (model.config.to_dict(), model.generation_config) == settings
        assert tokenizer.padding_side == side


def test_prompts_that_do_not_fit_are_counted_or_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts have 8, 6 and 5 tokens, in a context of 64. One that is cut is counted with its task and told; where
    most are, the task is another one."""
    given = {"tasks": ["written"], "include": str(folder)}
    with caplog.at_level(logging.WARNING):
        found = evaluate(tiny_llama(), adding("neither"), QUIET, max_new_tokens=56, **given)
        assert found["truncated"] == found["tasks"]["written"]["cut"] == 0 and not caplog.messages
        found = evaluate(tiny_llama(), adding("neither"), QUIET, max_new_tokens=57, **given)
    assert found["truncated"] == found["tasks"]["written"]["cut"] == 1
    assert "written: 1 of 3 requests do not fit" in caplog.text
    for length in (59, 64):
        with pytest.raises(UserError, match="max_new_tokens"):
            evaluate(tiny_llama(), adding("neither"), QUIET, max_new_tokens=length, **given)


def test_the_table_tells_how_many_requests_were_cut() -> None:
    summary = {"scores": {}, "requests_cut": {"gsm8k": 1319, "mmlu": 7}}
    assert dict(table.lines(summary))["requests cut to the context"] == "gsm8k 1,319, mmlu 7"
    assert "requests cut to the context" not in dict(table.lines(summary | {"requests_cut": {}}))


def test_choices_that_do_not_fit_are_counted_as_lm_eval_cuts_them(folder: Path) -> None:
    """A text that is scored may be one token longer than the context, since its last is only predicted."""
    lengths = [8 + 2, 6 + 2, 5 + 2]
    for context, expected in ((9, 0), (8, 2)):
        model = tiny_llama()
        model.config.max_position_embeddings = context
        found = evaluate(model, adding("neither"), QUIET, tasks=["chosen"], include=str(folder))
        assert found["tasks"]["chosen"]["cut"] == expected == 2 * sum(n > context + 1 for n in lengths)


def test_late_mistakes_of_lengths_are_told_before_work_and_at_once(tmp_path: Path) -> None:
    given = ("loss=sft", "max_length=12", "evaluation.max_new_tokens=505", f"store={tmp_path / 'store'}")
    with composed(*SMALL, *given, out=tmp_path) as cfg, pytest.raises(UserError) as told:
        run(resolve(cfg), tmp_path)
    assert len(told.value.args) == 2
    assert "max_length=12" in str(told.value) and "'tiny_arithmetic' does not fit" in str(told.value)
    assert not (tmp_path / "store").exists()


def test_texts_are_cut_at_the_models_context() -> None:
    """A model with learned positions has none beyond."""
    model, tokenizer = of_family("opt", blocks=2), adding("begin")
    assert context_of(model.config) == 128
    (batch,) = text_batches(tokenizer, ["a b c d " * 100], context=context_of(model.config))
    assert batch.input_ids.shape == (1, 128) and batch.input_ids[0, 0] == BEGIN
    assert run_model(model, batch.input_ids, batch.attention_mask).hidden.isfinite().all()
    (uncut,) = text_batches(tokenizer, ["a b c d " * 100])
    assert uncut.input_ids.shape == (1, 401)


# What a template may do to an answer; the first leaves it alone.
CHANGES = {
    "trims": "m.content | trim",
    "drops thoughts": "m.content.split('</think>')[-1]",
    "writes thoughts anew": "m.content | replace('</think>', '\n</think>\n')",
    "spells": "m.content | upper",
    "shortens": "m.content[:9]",
    "leaves out": "'ok'",
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_trained_is_what_the_row_says(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the template does to an answer, its labels are the row's own text and the end token, and rows that
    the template would have changed are counted and told."""
    tokenizer = load_tokenizer(CHECKPOINT)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and m.content != 'Good day' %}"
        f"{{{{ {CHANGES[kind]} }}}}{{% else %}}{{{{ m.content }}}}{{% endif %}}<|end|>{{% endfor %}}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    response = "17 + 14 </think> The answer is 31."
    with caplog.at_level(logging.WARNING):
        (row,), dropped = encode_all(tokenizer, [Example("first", "How many?", response)], max_length=99)
    trained = [label for label in row.labels if label != IGNORED]
    assert trained == tokenizer(response + "<|end|>", add_special_tokens=False)["input_ids"] and not dropped
    told = "1 of 1 rows: the chat template would change the answer" in caplog.text and "first" in caplog.text
    assert told == (kind != "trims")


def test_special_tokens_within_rows_are_told(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(CHECKPOINT)
    rows = [Example("plain", "How many?", "31"), Example("odd", "How many?", "3<|end|>1")]
    with caplog.at_level(logging.WARNING):
        encode_all(tokenizer, rows, max_length=99)
    assert "1 of 2 rows: prompt or answer hold special tokens" in caplog.text and "odd" in caplog.text


def test_named_templates_without_a_default_are_refused(folder: Path) -> None:
    tokenizer = adding("neither")
    tokenizer.chat_template = {"tool": TEMPLATES["end"], "rag": TEMPLATES["end"]}
    for asked in (
        lambda: ending(tokenizer),
        lambda: evaluate(tiny_llama(), tokenizer, QUIET, tasks=["tiny_facts"]),
    ):
        with pytest.raises(UserError, match="none is named default.*rag, tool"):
            asked()
    tokenizer.chat_template = {"default": TEMPLATES["end"], "rag": TEMPLATES["begin"]}
    assert ending(tokenizer).token == "<end>"


def test_tokens_that_the_model_has_no_embedding_for_are_refused() -> None:
    """Where they are read: as one that the tokenizer puts in itself, in the template, or in a row. One that nobody
    names, as in Gemma 3 for images, does no harm."""
    model, tokenizer = tiny_llama(), adding("neither")
    require_embedded(tokenizer, model.config)
    tokenizer.add_tokens(["<new>"])
    require_embedded(tokenizer, model.config, ["an old text"])
    with pytest.raises(UserError, match=f"<new> .{model.config.vocab_size}."):
        require_embedded(tokenizer, model.config, ["an old text", "a <new> text"])
    tokenizer.chat_template = TEMPLATES["end"] + "<new>"
    with pytest.raises(UserError, match="<new>"):
        require_embedded(tokenizer, model.config)
    tokenizer.chat_template, tokenizer.pad_token = None, "<new>"
    with pytest.raises(UserError, match="<new>"):
        require_embedded(tokenizer, model.config)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_head_that_contradicts_its_flag_is_refused(sharded: bool, tmp_path: Path) -> None:
    """Told as one and stored as two: refused at loading and before work. As one, or as two that are told or equal,
    it is read."""
    size = {"max_shard_size": "4KB"} if sharded else {}

    def saved(name: str, tied: bool, factor: float) -> Path:
        model = tiny_llama()
        with torch.no_grad():
            model.lm_head.weight.copy_(factor * model.model.embed_tokens.weight)
        model.save_pretrained(tmp_path / name, **size)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
        return tmp_path / name

    wrong = saved("wrong", True, 2)
    bare = skeleton(text_config(wrong), "float64")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_model(wrong)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        require_one_head(wrong, bare)
    for tied, factor in ((True, 1), (False, 2), (False, 1)):
        model = load_model(saved(f"{tied} {factor}", tied, factor))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert torch.equal(model.lm_head.weight, factor * model.model.embed_tokens.weight)
    require_one_head(saved("equal", True, 1), bare)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_length": 90}])
def test_the_cards_command_line_gives_the_runs_answers(settings: dict, tmp_path: Path) -> None:
    """lm-eval reads the printed arguments with its own parser and gives the same answers, whatever settings came
    with the model; without these arguments it does not."""
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = shutil.copytree(CHECKPOINT, tmp_path / "model")
    own = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(own | settings))
    line, unlike = lm_eval(folder, {"chat_template": True, "tasks": ["tiny_arithmetic"]})
    assert all("--include_path" in told for told in unlike) and ("--gen_kwargs" in line) == bool(settings)
    asked = HarnessCLI()._parser.parse_args(["run", *shlex.split(line)[1:]])
    assert asked.apply_chat_template and asked.model_args == {"pretrained": "."}
    assert asked.tasks == ["tiny_arithmetic"]

    model, tokenizer = frozen_model(folder, dtype="float32", attention="sdpa", device="cpu"), load_tokenizer(folder)
    given: dict[str, Any] = {"tasks": ["tiny_arithmetic"], "limit": 6}
    ours = evaluate(model, tokenizer, QUIET, **given)["tasks"]["tiny_arithmetic"]["samples"]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    extra = asked.gen_kwargs or {}

    def answered(**more: Any) -> list[str]:
        prompts = [render(tokenizer, question) for question in questions(ours)]
        kwargs = {"until": [], "max_gen_toks": 96, "do_sample": False, **more}
        return theirs.generate_until(
            [Instance("generate_until", {}, (prompt, kwargs), place) for place, prompt in enumerate(prompts)]
        )

    expected = [sample["response"] for sample in ours]
    assert answered(**extra) == expected
    assert (answered() == expected) == (not settings)


def questions(samples: list[dict[str, Any]]) -> list[str]:
    lines = (Path(sddx.__file__).parent / "tiny" / "tasks" / "arithmetic.report.jsonl").read_text().splitlines()
    return [json.loads(lines[sample["doc_id"]])["question"] for sample in samples]


def test_the_card_says_what_no_argument_does(tmp_path: Path) -> None:
    """A length of the model's own, and tokens around a text of which lm-eval has both or none."""
    for kind, extra, told in (
        ("neither", {}, []),
        ("begin", {}, []),
        ("end", {}, []),
        ("both", {}, ["before and after"]),
        ("neither", {"max_new_tokens": 8}, ["max_new_tokens"]),
    ):
        folder = tmp_path / f"{kind}{len(extra)}"
        adding(kind).save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END, **extra}))
        line, unlike = lm_eval(folder, {"chat_template": True, "tasks": ["piqa"]})
        assert [part for part in told if part in " ".join(unlike)] == told and len(unlike) == len(told)
        assert ("add_bos_token=False" in line) == (kind == "end")
        assert lm_eval(folder, {"encoding": "lm_eval", "generation_config": "model", "tasks": ["piqa"]}) == (
            "lm_eval --model hf --model_args pretrained=. --tasks piqa", [],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "words", "told"),
    [
        ({"tasks": ["piqa", "copa"], "shots": 2}, ["--num_fewshot", "2"], []),
        ({"tasks": ["piqa", "copa"], "shots": {"piqa": 1, "copa": 1}}, ["--num_fewshot", "1"], []),
        ({"tasks": ["piqa", "copa"], "shots": {"piqa": 1}}, [], ["piqa 1, copa as it says"]),
        ({"tasks": ["piqa"], "limit": {"piqa": 9, "copa": 8}}, ["--limit", "9"], ["takes the first"]),
        ({"tasks": ["piqa"], "max_new_tokens": 7}, ["--gen_kwargs", '{"max_gen_toks": 7}'], []),
        ({"tasks": ["piqa"], "side": "report", "data_dir": "rows"}, [], ["one side", "from files"]),
        ({"tasks": ["piqa", "mine"], "include": "here"}, [], ["piqa, mine come with"]),
        ({}, [], ["name them with --tasks"]),
    ],
)
def test_the_card_asks_for_what_the_run_asked(asked: dict, words: list, told: list, tmp_path: Path) -> None:
    """Tasks, examples, items and lengths, where lm-eval has an argument that says it; else what it has none for."""
    adding("neither").save_pretrained(tmp_path)
    line, unlike = lm_eval(tmp_path, asked)
    given = shlex.split(line)[5:]
    assert given == [*(["--tasks", ",".join(asked["tasks"])] if asked else []), *words]
    assert len(unlike) == len(told) and all(part in said for part, said in zip(told, unlike, strict=True))


def test_prompts_are_looked_at_before_the_first_is_answered() -> None:
    """Nothing is asked of a model whose prompts do not fit."""

    class Never(SameTokensHFLM):
        def __init__(self) -> None:
            self.tokenizer, self._max_length = adding("neither"), 8

        def generate_until(self, requests: Any) -> Any:
            raise AssertionError("it was asked")

    from lm_eval.api.instance import Instance

    request = Instance("generate_until", {}, ("a b c d", {"max_gen_toks": 5}), 0, metadata=("task", 0, 1))
    with pytest.raises(UserError, match="'task' does not fit the model: 1 of 1"):
        Fitting(Never(), 1).generate_until([request])
