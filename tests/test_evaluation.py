"""lm-eval in process on a tiny random Llama: its numbers recomputed by hand, its settings recorded."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sddx.data.encode import IGNORED, TEMPLATE_SETTINGS, Encoded, collate, render
from sddx.errors import UserError
from sddx.evaluation import harness, likelihoods, scored, tasks, text
from sddx.evaluation import items as sampling
from sddx.evaluation.right_answers import MEASURES
from sddx.records import Batch, Outputs
from sddx.runtime import Runtime
from sddx.statistics import answers

WORDS = [f"w{index}" for index in range(40)]
SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHOICE_TASK = """
task: choosing
custom_dataset: !function sddx.evaluation.harness.json_lines
dataset_kwargs: {data_files: {test: choosing.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.5, chance: 0.25}
"""
ANSWER_TASK = """
task: answering
custom_dataset: !function sddx.evaluation.harness.json_lines
dataset_kwargs: {data_files: {test: answering.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "w1 (w[0-9]+)"}, {function: take_first}]
  - name: flexible
    filter: [{function: regex, regex_pattern: "(w[0-9]+)", group_select: -1}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0, primary: "exact_match,flexible", chance: 0.0}
"""
QUIET = Runtime(quiet=True)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", additional_special_tokens=SPECIAL[2:]
    )
    built.chat_template = TEMPLATE
    return built


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=44, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(tokenizer, question: str) -> str:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )


def greedy(model, tokenizer, question: str) -> str:
    ids = tokenizer(prompt(tokenizer, question), return_tensors="pt").input_ids
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model, tokenizer) -> Path:
    """Task files; every third answer is the one that the model gives, so that some are right."""
    made, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    questions = [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(12)]
    choices = [[" ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(4)] for _ in questions]
    choosing = [{"question": q, "choices": choices[i], "gold": i % 4} for i, q in enumerate(questions)]
    own = [greedy(model, tokenizer, question).split()[-1] for question in questions]
    answers = [word if i % 3 == 0 else "none" for i, word in enumerate(own)]
    answering = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    for name, rows, yaml in (("choosing", choosing, CHOICE_TASK), ("answering", answering, ANSWER_TASK)):
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (made / f"{name}.yaml").write_text(yaml)
    return made


@pytest.fixture(scope="module")
def results(model, tokenizer, folder: Path) -> dict:
    return harness.evaluate(
        model, tokenizer, QUIET, tasks=["choosing", "answering"], include=str(folder), batch_size=5
    )


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_multiple_choice_is_the_sum_of_log_probabilities(results, model, tokenizer, folder: Path) -> None:
    """Each choice scores the summed log-probabilities of its tokens after the templated prompt, one row at a
    time and unpadded; the highest is chosen."""
    for sample, row in zip(results["tasks"]["choosing"]["samples"], rows_of(folder, "choosing"), strict=True):
        context = tokenizer(prompt(tokenizer, row["question"]), return_tensors="pt").input_ids
        sums = []
        for choice in row["choices"]:
            answer = tokenizer(choice, return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(torch.cat([context, answer], 1)).logits.double()
            steps = logits[0, context.shape[1] - 1 : -1].log_softmax(-1)
            sums.append(float(steps.gather(1, answer[0, :, None]).sum()))
        assert sample["likelihoods"] == pytest.approx(sums, abs=1e-4)
        assert sample["score"] == float(max(range(4), key=sums.__getitem__) == row["gold"])


def test_half_precision_logits_are_normalised_in_full(model, tokenizer, folder: Path) -> None:
    """Likelihoods of a bfloat16 model are float32 softmaxes of its logits: in bfloat16, whose steps are 1/32 near
    the -4 of a guess among 40 words, unequal choices would tie."""
    rounded = copy.deepcopy(model).bfloat16()
    how = {"tasks": ["choosing"], "include": str(folder), "batch_size": 1}
    samples = harness.evaluate(rounded, tokenizer, QUIET, **how)["tasks"]["choosing"]["samples"]
    found, full, coarse = [], [], []
    for sample, row in zip(samples, rows_of(folder, "choosing"), strict=True):
        context = tokenizer(prompt(tokenizer, row["question"]), return_tensors="pt").input_ids
        for choice, value in zip(row["choices"], sample["likelihoods"], strict=True):
            answer = tokenizer(choice, return_tensors="pt").input_ids
            with torch.no_grad():
                logits = rounded(torch.cat([context, answer], 1)[:, :-1]).logits[0, context.shape[1] - 1 :]
            steps = [logits.to(dtype).log_softmax(-1).gather(1, answer[0, :, None]) for dtype in DTYPES]
            found.append(value)
            full.append(float(steps[0].sum()))
            coarse.append(float(steps[1].sum()))
    assert found == pytest.approx(full, abs=1e-5)
    assert found != pytest.approx(coarse, abs=1e-3)


def test_generated_answers_are_greedy_and_scored_by_filter(results, model, tokenizer, folder: Path) -> None:
    """Responses equal greedy decoding one by one; strict and flexible scores and unparsed shares follow."""
    record = results["tasks"]["answering"]
    strict, flexible = [], []
    for sample, row in zip(record["samples"], rows_of(folder, "answering"), strict=True):
        assert sample["response"] == greedy(model, tokenizer, row["question"])
        strict.append((re.findall(r"w1 (w\d+)", sample["response"]) or ["[invalid]"])[0])
        flexible.append((re.findall(r"w\d+", sample["response"]) or ["[invalid]"])[-1])
    answers = [row["answer"] for row in rows_of(folder, "answering")]
    assert record["metrics"]["exact_match,strict"] == sum(map(str.__eq__, strict, answers)) / 12
    assert record["score"] == sum(map(str.__eq__, flexible, answers)) / 12 == 4 / 12
    unparsed = {"strict": strict.count("[invalid]") / 12, "flexible": flexible.count("[invalid]") / 12}
    assert record["unparsed"] == unparsed
    assert record["unparsed"]["strict"] > 0


def test_records_say_how_they_were_measured(results, tokenizer) -> None:
    """Version, primary metric, chance, template, shots, filters and seeds stand beside every score."""
    choosing, answering = results["tasks"]["choosing"], results["tasks"]["answering"]
    assert choosing["settings"]["version"] == 1.5 and choosing["chance"] == 0.25 and choosing["n"] == 12
    assert choosing["settings"]["primary"] == "acc,none"
    assert answering["settings"]["primary"] == "exact_match,flexible"
    assert [f["name"] for f in answering["settings"]["filters"]] == ["strict", "flexible"]
    assert answering["settings"]["shots"] == 0 and answering["settings"]["chat_template"]
    assert results["truncated"] == 0 and results["batch_size"] == 5
    json.dumps(results)


def test_the_batch_size_reaches_the_model(model, tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest batch that the model sees has the size that was asked for (lm-eval can ignore it)."""
    sizes, forward = [], model.forward

    def counted(*args, **kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        sizes.append(len(ids))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    given = {"tasks": ["answering", "choosing"], "include": str(folder)}
    for size in (3, 7):
        sizes.clear()
        harness.evaluate(model, tokenizer, QUIET, batch_size=size, **given)
        assert max(sizes) == size


def test_batch_size_and_other_tasks_change_no_score(results, model, tokenizer, folder: Path) -> None:
    """Items score the same alone in another batch size, and the global random state is left as it was."""
    random.seed(5)
    torch.manual_seed(5)
    alone = harness.evaluate(model, tokenizer, QUIET, tasks=["answering"], include=str(folder), batch_size=2)
    state = random.random(), float(torch.rand(()))
    random.seed(5)
    torch.manual_seed(5)
    assert state == (random.random(), float(torch.rand(())))
    assert [s["response"] for s in alone["tasks"]["answering"]["samples"]] == [
        s["response"] for s in results["tasks"]["answering"]["samples"]
    ]


def test_template_and_length_are_settings(results, model, tokenizer, folder: Path) -> None:
    """Without the template the prompts are others; a length from outside wins; a limit is no first-N."""
    given = {"tasks": ["answering"], "include": str(folder), "max_new_tokens": 2, "limit": 5}
    plain = harness.evaluate(model, tokenizer, QUIET, chat_template=False, **given)["tasks"]["answering"]
    assert plain["settings"]["chat_template"] is None and plain["settings"]["generation"]["max_gen_toks"] == 2
    assert all(len(sample["response"].split()) <= 2 for sample in plain["samples"])
    chosen = [sample["doc_id"] for sample in plain["samples"]]
    assert len(chosen) == 5 and chosen == sorted(chosen) != list(range(5))
    full = {s["doc_id"]: s for s in results["tasks"]["answering"]["samples"]}
    assert all(full[s["doc_id"]]["doc_hash"] == s["doc_hash"] for s in plain["samples"])
    assert all(full[s["doc_id"]]["prompt_hash"] != s["prompt_hash"] for s in plain["samples"])


def test_shots_are_set_and_recorded(results, model, tokenizer, folder: Path) -> None:
    """One example before every question is another prompt, and the record says so."""
    given = {"tasks": ["choosing"], "include": str(folder)}
    shot = harness.evaluate(model, tokenizer, QUIET, shots={"choosing": 1}, **given)["tasks"]["choosing"]
    assert shot["settings"]["shots"] == 1
    bare = results["tasks"]["choosing"]["samples"]
    assert all(a["prompt_hash"] != b["prompt_hash"] for a, b in zip(shot["samples"], bare, strict=True))


def test_a_quiet_run_prints_nothing(model, tokenizer, folder: Path, capfd) -> None:
    harness.evaluate(model, tokenizer, QUIET, tasks=["answering"], include=str(folder))
    assert capfd.readouterr() == ("", "")


def test_compact_keeps_scores_hashes_and_settings(results) -> None:
    """One score and one distinct hash per item, JSON all through, and stable from call to call."""
    found = scored.compact(results)
    assert json.loads(json.dumps(found)) == scored.compact(json.loads(json.dumps(results)))
    assert found["choosing"]["scores"] == [s["score"] for s in results["tasks"]["choosing"]["samples"]]
    assert len(set(found["choosing"]["hashes"])) == 12
    assert found["answering"]["part_of"] == "answering"


def test_groups_are_reported_under_their_name(model, tokenizer, folder: Path, tmp_path: Path) -> None:
    """A group's tasks know the name they were asked for under, and lm-eval's own figure is kept."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [choosing]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    found = harness.evaluate(model, tokenizer, QUIET, tasks=["both"], include=str(tmp_path))
    assert found["tasks"]["choosing"]["part_of"] == "both"
    assert found["groups"]["both"]["acc,none"] == pytest.approx(found["tasks"]["choosing"]["score"])
    with pytest.raises(UserError, match="asked for twice"):
        harness.evaluate(model, tokenizer, QUIET, tasks=["both", "choosing"], include=str(tmp_path))


GROUPS = """
group: outer
task: [inner, answering]
aggregate_metric_list: [{metric: acc, weight_by_size: true, filter_list: [none]}]
---
group: inner
task: [tagged]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture
def nested(folder: Path, tmp_path: Path) -> str:
    """Tasks `choosing` and `choosing_more` under a tag, in a group, in a group with `answering`."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    for number, group in enumerate(GROUPS.split("---")):
        (tmp_path / f"group{number}.yaml").write_text(group)
    (tmp_path / "choosing.yaml").write_text(CHOICE_TASK + "tag: tagged\n")
    (tmp_path / "more.yaml").write_text("include: choosing.yaml\ntask: choosing_more\nnum_fewshot: 0\n")
    return str(tmp_path)


def test_groups_in_groups_are_one_reported_task(model, tokenizer, nested: str) -> None:
    """All tasks below, through tags too, belong to the name that was asked for; what is given for it holds for
    each, and every group's own figure is kept."""
    given = {"shots": {"inner": 1}, "primary": {"inner": "acc,none"}, "chance": {"inner": None}}
    found = harness.evaluate(model, tokenizer, QUIET, tasks=["inner", "answering"], include=nested, **given)
    part_of = {name: record["part_of"] for name, record in found["tasks"].items()}
    assert part_of == {"choosing": "inner", "choosing_more": "inner", "answering": "answering"}
    assert found["tasks"]["choosing"]["chance"] is None and found["tasks"]["answering"]["chance"] == 0.0
    # lm-eval's rule: a task that fixes 0 examples keeps them.
    assert [found["tasks"][name]["settings"]["shots"] for name in part_of] == [1, 0, 0]
    scores = [found["tasks"][name]["score"] for name in ("choosing", "choosing_more")]
    assert found["groups"]["inner"]["acc,none"] == pytest.approx(sum(scores) / 2)
    manager = tasks.task_manager(["outer"], nested)
    assert tasks.load(["outer"], nested)[1] == dict.fromkeys(manager.load(["outer"])["tasks"], "outer")
    assert len(tasks.load(["outer"], nested)[1]) == 3


def test_shots_asked_for_by_name_win_over_a_fixed_zero(nested: str) -> None:
    """One number for all leaves a task alone that fixes 0; its own name does not."""
    for shots, expected in ((3, 0), ({"choosing_more": 3}, 3), ({}, 0), (None, 0)):
        loaded, part_of = tasks.load(["choosing_more"], nested)
        tasks.configure(loaded["tasks"], part_of, shots=shots, max_new_tokens=None, metadata={})
        assert loaded["tasks"]["choosing_more"].get_config("num_fewshot") == expected


def test_a_limit_is_shared_out_among_the_parts(model, tokenizer, nested: str) -> None:
    """By asked-for task, in equal numbers; what is not named is whole. Settings are those of the whole: what tells
    a sample from it is its items."""
    given = {"tasks": ["inner", "answering"], "include": nested, "limit": {"inner": 6}}
    found = harness.evaluate(model, tokenizer, QUIET, **given)["tasks"]
    assert {name: record["n"] for name, record in found.items()} == {
        "choosing": 3, "choosing_more": 3, "answering": 12,
    }  # fmt: skip
    whole = harness.evaluate(model, tokenizer, QUIET, **{**given, "limit": None})["tasks"]
    assert all(record["settings"] == whole[name]["settings"] for name, record in found.items())
    assert (
        scored.compact({"tasks": found})["choosing"]["hashes"]
        != scored.compact({"tasks": whole})["choosing"]["hashes"]
    )


@pytest.mark.parametrize("total", [1, 7, 57, 100, 1140, 14042, 10**6])
def test_shares_are_equal_as_far_as_parts_reach(total: int) -> None:
    """They add up to the total (at least one of each, at most all), and differ by one at most among the parts that
    have more to give."""
    sizes = {str(number): random.Random(number).randint(5, 300) for number in range(57)}
    shares = sampling.shared_out(total, sizes)
    assert sum(shares.values()) == min(max(total, 57), sum(sizes.values()))
    assert all(1 <= shares[name] <= size for name, size in sizes.items())
    open_parts = [share for name, share in shares.items() if share < sizes[name]]
    assert not open_parts or max(shares.values()) <= min(open_parts) + 1


class Sized:
    """What a drawing looks at of a task."""

    def __init__(self, size: int) -> None:
        self.eval_docs = range(size)


def test_what_is_drawn_hangs_on_the_name_alone() -> None:
    """Each item is drawn as often as any other; a smaller limit draws a part of a larger one's items, and other
    tasks beside it change nothing."""
    names = [f"task{number}" for number in range(400)]
    sized, own = {name: Sized(40) for name in names}, {name: name for name in names}
    few, many = (sampling.draw(sized, own, limit) for limit in (10, 20))
    assert all(set(few[name]) < set(many[name]) and few[name] == sorted(few[name]) for name in names)
    alone = sampling.draw({"task7": Sized(40)}, {"task7": "task7"}, {"task7": 10})
    assert alone == {"task7": few["task7"]}
    counts = [sum(item in few[name] for name in names) for item in range(40)]  # binomial: 100, deviation 8.7
    assert 65 < min(counts) and max(counts) < 135
    assert sampling.draw(sized, own, None) is None


def test_the_precision_to_expect_is_said_once(model, tokenizer, folder: Path, caplog) -> None:
    """Before the first model is run, and not again for those that it is compared with."""
    given = {"tasks": ["choosing"], "include": str(folder), "limit": 11}
    with caplog.at_level("INFO", "sddx"):
        for _ in range(2):
            harness.evaluate(model, tokenizer, Runtime(), **given)
    (line,) = [record.getMessage() for record in caplog.records if "Half-widths" in record.getMessage()]
    assert "11 items" in line and "choosing 29.5, average 29.5, recovery 83.6" in line


def test_unknown_tasks_are_named_with_near_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt task is refused before any work, with what it may have meant."""
    from lm_eval.tasks import TaskManager

    only_ours = TaskManager(include_path=[folder], include_defaults=False)
    # The built-in index takes 5 s.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: only_ours)
    with pytest.raises(UserError, match="'chosing'; near names: choosing"):
        tasks.check_tasks(["answering", "chosing"], str(folder))
    with pytest.raises(UserError, match="more than once"):
        tasks.check_tasks(["answering", "answering"], str(folder))
    with pytest.raises(UserError, match="nowhere is no folder"):
        tasks.check_tasks(["answering"], str(folder / "nowhere"))
    with pytest.raises(UserError, match="'answring'; near names: answering"):
        tasks.check_tasks(["choosing"], str(folder), shots={"choosing": 1, "answring": 5}, primary=None)
    tasks.check_tasks(["choosing"], str(folder), limit={"answering": 5}, shots=3)


def test_known_tasks_are_checked_without_lm_eval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks whose YAML is in the folder need no index at all."""
    monkeypatch.setattr(tasks, "task_manager", lambda *given: pytest.fail("the index was read"))
    tasks.check_tasks(["choosing", "answering"], str(folder))


def test_an_unknown_metric_is_refused_before_the_model_runs(
    model, tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    given = {"tasks": ["choosing", "answering"], "include": str(folder)}
    with pytest.raises(UserError, match="no metric 'acc_nrm,none'; it has acc,none"):
        harness.evaluate(model, tokenizer, QUIET, primary={"choosing": "acc_nrm,none"}, **given)


def test_mistakes_are_said(model, tokenizer, folder: Path, tmp_path: Path) -> None:
    """Missing data, a missing template, an unknown metric and an answer longer than the context."""
    (tmp_path / "choosing.yaml").write_text(CHOICE_TASK)
    with pytest.raises(UserError, match="choosing.jsonl is not there .looked in .*Mend dataset_kwargs.data_files"):
        harness.evaluate(model, tokenizer, QUIET, tasks=["choosing"], include=str(tmp_path))
    given = {"tasks": ["answering"], "include": str(folder)}
    with pytest.raises(UserError, match="no metric 'f1,strict'; it has exact_match,strict, exact"):
        harness.evaluate(model, tokenizer, QUIET, primary={"answering": "f1,strict"}, **given)
    with pytest.raises(UserError, match="up to 64 new tokens.*context has 64"):
        harness.evaluate(model, tokenizer, QUIET, max_new_tokens=64, **given)
    with pytest.raises(UserError, match="no chat template"):
        bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
        harness.evaluate(model, bare, QUIET, **given)


def test_prompts_are_those_that_training_reads(model, tokenizer, folder: Path) -> None:
    """In a template that thinks and dates unless told otherwise; what it is told is part of the comparison."""
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ date_string }} {% if enable_thinking is false %}w0 {% endif %}" + TEMPLATE
    given = {"tasks": ["answering"], "include": str(folder)}
    record = harness.evaluate(model, dated, QUIET, **given)["tasks"]["answering"]
    for sample, row in zip(record["samples"], rows_of(folder, "answering"), strict=True):
        prompt = render(dated, row["question"])
        assert prompt.startswith("26 Jul 2024 w0 <user>")
        assert sample["prompt_hash"] == hashlib.sha256(prompt.encode()).hexdigest()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(TEMPLATE_SETTINGS, "enable_thinking", True)
        other = harness.evaluate(model, dated, QUIET, limit=1, **given)["tasks"]["answering"]
    assert other["settings"]["chat_template"] != record["settings"]["chat_template"]


def test_a_description_needs_a_template_that_keeps_it(model, tokenizer, folder: Path, tmp_path: Path) -> None:
    """lm-eval puts it into a system turn, and would go on without where the template refuses one."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "choosing.yaml").write_text(CHOICE_TASK + "description: w1 w2\n")
    given = {"tasks": ["choosing", "answering"], "include": str(tmp_path)}
    kept = harness.evaluate(model, tokenizer, QUIET, **given)["tasks"]["choosing"]["samples"]
    prompt = "<system> w1 w2 <end> " + render(tokenizer, rows_of(folder, "choosing")[0]["question"])
    assert kept[0]["prompt_hash"] == hashlib.sha256(prompt.encode()).hexdigest()
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + TEMPLATE
    )
    with pytest.raises(UserError, match=r"drops the system prompt \(none\).* of these tasks there: choosing\."):
        harness.evaluate(model, refusing, QUIET, **given)
    harness.evaluate(model, refusing, QUIET, chat_template=False, **given)


def test_divergence_is_the_mean_kl_over_attended_tokens(model) -> None:
    """0 against itself; equal to torch's kl_div on the attended tokens, in chunks of any size."""
    torch.manual_seed(1)
    width, vocabulary = 16, 44
    head = torch.nn.Linear(width, vocabulary)
    hidden = torch.randn(2, 7, width)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    ids = torch.randint(4, vocabulary, (2, 7))
    batch = Batch(ids, mask, torch.full_like(ids, -100))

    def teacher(batch: Batch, states: bool = False) -> Outputs:
        return Outputs(hidden[:, : batch.input_ids.shape[1]], head)

    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        expected = torch.nn.functional.kl_div(
            logits.log_softmax(-1), head(hidden).log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)[mask.bool()]
    for chunk in (3, 512):
        found = text.held_out(model, [batch], teacher, chunk=chunk)
        assert found == {"kl": pytest.approx(float(expected.mean()), 1e-5), "perplexity": None}
        assert text.divergences(teacher, model, [batch], chunk=chunk).mean() == pytest.approx(found["kl"], 1e-9)
    itself = lambda batch, states=False: text.run(model, batch.input_ids, batch.attention_mask)  # noqa: E731
    assert text.held_out(model, [batch], itself)["kl"] == pytest.approx(0.0, abs=1e-7)
    assert text.held_out(model, [], teacher) == {"kl": None, "perplexity": None}


def test_perplexity_counts_every_labelled_token_once(model) -> None:
    """Equal to torch's cross-entropy of the model's own logits, whatever the chunk, the padding, and the way in
    which the texts are put into batches; None where no text has a second token."""
    rows = [Encoded("", ids, [*ids[1:], IGNORED], len(ids) - 1) for ids in ([5, 9, 7, 6, 8, 4, 11], [12, 5, 40])]
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[:-1]), reduction="none"))
    expected = float(torch.cat(losses).double().mean().exp())
    for chunk in (2, 512):
        for batches in ([collate(rows, 0)], [collate([row], 0) for row in rows]):
            found = text.held_out(model, batches, chunk=chunk)
            assert found == {"kl": 0.0, "perplexity": pytest.approx(expected, rel=1e-5)}
    assert text.held_out(model, [collate([Encoded("", [5], [IGNORED], 0)], 0)])["perplexity"] is None


def test_repetition_and_length_by_hand() -> None:
    """'a b c d' twice over has five 4-grams, one of them seen before; short answers have none."""
    assert answers.repetition(["a b c d a b c d"]) == pytest.approx(1 / 5)
    assert answers.repetition(["a b c d", "a b c d"]) == 0.0
    assert answers.repetition(["a b"]) is None
    assert answers.mean_length(["a b", "a b c d"]) == 3.0 and answers.mean_length([]) is None


def watched(model, stop: int, patch: pytest.MonkeyPatch) -> tuple[LlamaForCausalLM, list[int]]:
    """A copy of the model that is interrupted in its pass number `stop`, and the requests of its passes so far. A
    pass that judges reads a question with its choices."""
    copied, prompts, scored = copy.deepcopy(model), [], likelihoods._scored

    def passed(requests: int) -> None:
        if len(prompts) == stop:
            raise KeyboardInterrupt
        prompts.append(requests)

    def look(module, given, named) -> None:
        rows, width = (given[0] if given else named["input_ids"]).shape
        passed(rows if width > 1 else 0)

    def judge(model, head, rows, asked):
        passed(sum(len(row.texts) for row in rows))
        return scored(model, head, rows, asked)

    copied.register_forward_pre_hook(look, with_kwargs=True)
    patch.setattr(likelihoods, "_scored", judge)
    patch.setattr(likelihoods, "PASS_TOKENS", 1)
    return copied, prompts


@pytest.mark.parametrize("stop", [1, 5, 11, 20])
def test_an_interrupted_evaluation_asks_only_for_what_is_not_answered(
    model, tokenizer, folder, results, tmp_path, monkeypatch, stop: int
) -> None:
    """Wherever it was stopped, and where a crash cut its last line short, it ends as one that was not; the 48
    choices and 12 questions are asked once each, but for the batch that was under way."""
    asked = {"tasks": ["choosing", "answering"], "include": str(folder), "batch_size": 5}
    answered = tmp_path / "answers.jsonl"
    with monkeypatch.context() as patch:
        stopped, _ = watched(model, stop, patch)
        with pytest.raises(KeyboardInterrupt):
            harness.evaluate(stopped, tokenizer, QUIET, answered, **asked)
    known = len(answered.read_text().split("\n")) - 2
    with answered.open("a") as file:
        file.write('["a request", "an ans')
    resumed, prompts = watched(model, 1000, monkeypatch)
    found = harness.evaluate(resumed, tokenizer, QUIET, answered, **asked)
    assert known > 0 and known + sum(prompts) <= 60
    for name, record in found["tasks"].items():
        for ours, theirs in zip(record["samples"], results["tasks"][name]["samples"], strict=True):
            likelihoods = theirs["likelihoods"] and pytest.approx(theirs["likelihoods"], abs=1e-5)
            made = {name: theirs[name] and pytest.approx(theirs[name], abs=1e-5) for name in MEASURES}
            assert ours == {**theirs, "likelihoods": likelihoods, **made}
