"""Rows of lm-eval's own tasks in local files: the same numbers as lm-eval's on these rows, one side of them, and a
sentence for all that may be wrong with a file. No network is used; the rows here are made up."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from composing import SMALL, composed, resolve
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sddx.commands.fetch import _task_data
from sddx.config.build import build
from sddx.errors import UserError
from sddx.evaluation import items, task_data, tasks
from sddx.evaluation.harness import _calm, _precision, evaluate, require_tasks, task_texts
from sddx.evaluation.scored import compact
from sddx.evaluation.seeds import seeded
from sddx.importance.coalitions import TaskScore
from sddx.runtime import Runtime
from sddx.stages.cost import estimated
from sddx.stages.inputs import keyed_rows, read_by
from sddx.store import Store
from sddx.train import look, run

QUIET = Runtime(quiet=True)
LETTERS = {"text": ["hot", "wet", "tall", "loud"], "label": ["A", "B", "C", "D"]}
# A few made-up rows for each task of evaluation=small, in the hub's columns.
ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {"id": f"a{n}", "question": f"What is {thing}?", "choices": LETTERS, "answerKey": key}
        for n, (thing, key) in enumerate([("fire", "A"), ("rain", "B"), ("a tower", "C"), ("a drum", "D")])
    ],
    "piqa": [
        {"goal": f"cool {what}", "sol1": "put it on ice", "sol2": "put it on the stove, for long", "label": n % 2}
        for n, what in enumerate(["tea", "soup", "a brow", "milk", "glass"])
    ],
    "hellaswag": [
        {
            "ind": n, "activity_label": "Baking [title] bread", "ctx_a": f"A cook takes {n} eggs.",
            "ctx_b": "the cook", "endings": ["breaks them.", "sings.", "flies off.", "reads [x] a map."],
            "label": str(n % 4),
        }
        for n in range(4)
    ],
    "lambada_openai": [
        {"text": f"she had {n} dogs and he had a cat. at night both went to look for his lost {last}"}
        for n, last in enumerate(["cat", "cat", "kätzchen", "dog"])
    ],
    "openbookqa": [
        {"id": f"o{n}", "question_stem": f"The {thing} is", "choices": LETTERS, "answerKey": key}
        for n, (thing, key) in enumerate([("sun", "A"), ("sea", "B"), ("hill", " C")])
    ],
    "boolq": [
        {"passage": f"Lakes hold water. This one holds {n // 2} fish.", "question": q, "idx": n, "label": n % 2}
        for n, q in enumerate(["do lakes hold water", "is it dry", "are there fish", "is it a sea", "is it a lake"])
    ],
    "winogrande": [
        {
            "sentence": f"Ann thanked Eve {n // 2} times since _ gave {n} pears.",
            "option1": "Ann", "option2": "Eve", "answer": a,
        }
        for n, a in enumerate("212")
    ],
    "copa": [
        {"premise": f"Jar {n} fell.", "choice1": "It broke.", "choice2": "It sang.", "question": q, "label": n % 2}
        for n, q in enumerate(["effect", "cause", "effect"])
    ],
}  # fmt: skip


def write(folder: Path, rows: dict[str, list[dict[str, Any]]] = ROWS, suffix: str = "") -> str:
    folder.mkdir(exist_ok=True, parents=True)
    for task, found in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{task}{suffix}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)


def settings(*overrides: str, group: str = "small") -> dict[str, Any]:
    with composed(f"evaluation={group}", *overrides) as cfg:
        return {key: value for key, value in resolve(cfg)["evaluation"].items() if key != "vllm"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(alphabet | {"<end>": 256}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=256, pad_token_id=256, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def by_lm_eval(
    model: Any,
    tokenizer: Any,
    names: list[str],
    rows: dict[str, list],
    monkeypatch: pytest.MonkeyPatch,
    shots: int = 0,
) -> dict[str, Any]:
    """lm-eval by itself, with its hub giving these rows: of the judged split, and of the one before it."""
    of_path = {"ai2_arc": "arc_easy", "aps/super_glue": None}

    def load_dataset(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        short = path.rpartition("/")[2]
        task = name if path == "aps/super_glue" else of_path.get(short, short)
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows[str(task)]) for split in ("train", "validation", "test")}
        )

    with monkeypatch.context() as patched, seeded():
        patched.setattr(datasets, "load_dataset", load_dataset)
        loaded = TaskManager().load(names)
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", shots)
            task.set_fewshot_seed(1234)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32")
        return evaluator.evaluate(lm, loaded, bootstrap_iters=0, log_samples=True)


def require_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for task, record in ours["tasks"].items():
        numbers = {name: value for name, value in theirs["results"][task].items() if name in record["metrics"]}
        assert numbers and record["metrics"] == pytest.approx(numbers), task
        rows = sorted(theirs["samples"][task], key=lambda row: row["doc_id"])
        for sample, row in zip(record["samples"], rows, strict=True):
            assert sample["doc_hash"] == row["doc_hash"] and sample["prompt_hash"] == row["prompt_hash"]
            assert sample["likelihoods"] == pytest.approx([each[0][0] for each in row["resps"]], rel=1e-6, abs=1e-5)


def test_rows_of_files_score_as_lm_eval_scores_them(model, tokenizer, folder: str, monkeypatch) -> None:
    """All eight tasks of evaluation=small, by lm-eval's own reading of the same rows from its hub."""
    given = settings(f"evaluation.data_dir={folder}", "evaluation.side=null")
    found = build(given)(model, tokenizer, QUIET)
    assert list(found["tasks"]) == list(ROWS)
    assert {name: record["n"] for name, record in found["tasks"].items()} == {t: len(r) for t, r in ROWS.items()}
    require_same(found, by_lm_eval(model, tokenizer, list(ROWS), ROWS, monkeypatch))
    for name, record in found["tasks"].items():
        assert record["settings"]["primary"] == given["primary"][name] and record["chance"] == given["chance"][name]
        assert record["settings"]["shots"] == 0 and record["apart"] == (name in given["apart"])


def test_examples_come_from_the_training_file(model, tokenizer, tmp_path: Path, monkeypatch) -> None:
    """As lm-eval shows them; without that file a sentence names it, and no example needs none."""
    rows, asked = {"piqa": ROWS["piqa"]}, {"tasks": ["piqa"], "data_dir": str(tmp_path), "chat_template": False}
    write(tmp_path, rows)
    with pytest.raises(UserError, match=r"to show 2 examples .* has no file of them: piqa\.train\.jsonl"):
        require_tasks(tasks=["piqa"], shots=2, data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"piqa\.train\.jsonl\. Put it there, or set evaluation\.shots=0"):
        evaluate(model, tokenizer, QUIET, shots=2, **asked)
    require_tasks(tasks=["piqa"], shots=0, data_dir=str(tmp_path))
    write(tmp_path, rows, ".train")
    require_tasks(tasks=["piqa"], shots=2, data_dir=str(tmp_path))
    found = evaluate(model, tokenizer, QUIET, shots=2, **asked)
    require_same(found, by_lm_eval(model, tokenizer, ["piqa"], rows, monkeypatch, shots=2))
    other = evaluate(model, tokenizer, QUIET, split={"piqa": "train"}, **asked)
    assert other["tasks"]["piqa"]["settings"]["split"] == "train"


def test_json_arrays_and_parquet_are_read_as_lines_are(folder: str, tmp_path: Path) -> None:
    texts = task_texts(["piqa", "hellaswag"], None, None, None, data_dir=folder)
    (tmp_path / "piqa.json").write_text(json.dumps(ROWS["piqa"], indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS["hellaswag"]), tmp_path / "hellaswag.parquet")
    assert task_texts(["piqa", "hellaswag"], None, None, None, data_dir=str(tmp_path)) == texts


def test_files_of_a_group_are_those_of_its_parts(folder: str, tmp_path: Path) -> None:
    """A part by a file of its own name; of those without, the first few are named."""
    part = {"question": "is it", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": "anatomy"}
    write(tmp_path, {"mmlu_anatomy": [part] * 3})
    assert list(task_texts(["mmlu_anatomy"], None, None, None, data_dir=str(tmp_path))) == ["mmlu_anatomy"]
    with pytest.raises(UserError, match=r"lacks rows: mmlu_\w+\.jsonl .*and of 53 more") as told:
        require_tasks(tasks=["mmlu"], data_dir=str(tmp_path))
    assert len(told.value.args) == 1 and "mmlu_anatomy" not in str(told.value)


def changed(task: str, **columns: Any) -> dict[str, list]:
    """The rows of a task with other columns; without those that are None."""
    rows = [{**row, **columns} for row in ROWS[task]]
    return {task: [{name: value for name, value in row.items() if value is not None} for row in rows]}


COLUMNS = [
    (task, column)
    for task, rows in ROWS.items()
    for column in rows[0]
    if column not in ("id", "ind", "idx")  # which no task reads
]


@pytest.mark.parametrize("task, column", COLUMNS, ids=lambda value: value)
def test_a_column_that_is_missing_is_named(task: str, column: str, tmp_path: Path) -> None:
    """With its file, its task and the columns that there are: every column that any of the eight reads."""
    write(tmp_path, changed(task, **{column: None}))
    left = ", ".join(name for name in ROWS[task][0] if name != column)
    if not left:  # lambada has one column
        write(tmp_path, {task: [{"texts": "a b"}]})
        left = "texts"
    with pytest.raises(UserError) as told:
        require_tasks(tasks=[task], data_dir=str(tmp_path))
    said = f"{tmp_path / task}.jsonl has no column {column!r}, which the task {task!r} reads; it has {left}."
    assert said in str(told.value) and len(told.value.args) == 1


def test_what_is_wrong_with_files_is_told_before_any_work(tmp_path: Path) -> None:
    """All at once, by file and task."""

    def refused(*names: str, **given: Any) -> str:
        with pytest.raises(UserError) as told:
            require_tasks(tasks=list(names), **{"data_dir": str(tmp_path), **given})
        return "\n".join(told.value.args)

    assert "evaluation.data_dir=/nowhere is no folder" in refused("piqa", data_dir="/nowhere")
    both = refused("piqa", "copa")
    assert "piqa.jsonl (task 'piqa')" in both and "copa.jsonl (task 'copa')" in both and both.count("\n") == 1
    write(tmp_path)
    piqa = tmp_path / "piqa.jsonl"
    piqa.write_text(piqa.read_text() + '{"goal": "cut', encoding="utf-8")
    assert f"{piqa} is neither JSON lines nor a JSON array: row 6: " in refused("piqa", "copa")
    write(tmp_path, {"piqa": [*ROWS["piqa"], {"goal": "x", "sol1": "y", "sol2": "z"}]})
    assert f"{piqa}, row 6 has no 'label', and other rows have." in refused("piqa")
    write(tmp_path, {"piqa": [*ROWS["piqa"], {**ROWS["piqa"][0], "label": 2}]})
    assert "'piqa' cannot use document 6 of its split 'validation': its answer is 2" in refused("piqa")
    write(tmp_path, {"piqa": ROWS["piqa"]}, ".validation")
    assert "both hold its split 'validation'" in refused("piqa")
    piqa.unlink()
    require_tasks(tasks=["piqa"], data_dir=str(tmp_path))
    (tmp_path / "piqa.validation.json").write_text("[]")
    assert "has piqa.validation.json and piqa.validation.jsonl for 'piqa'" in refused("piqa")
    for path in tmp_path.glob("piqa.*"):
        path.unlink()
    write(tmp_path, {"piqa": ROWS["piqa"]}, ".train")
    assert "lacks the split that is judged: piqa.validation.jsonl" in refused("piqa")
    require_tasks(tasks=["piqa"], split={"piqa": "train"}, data_dir=str(tmp_path))
    assert "no column 'passages' to tell its clusters by" in refused("boolq", cluster={"boolq": "passages"})
    assert "leaves no task for the average" in refused("boolq", apart=["boolq", "copa"])


def test_a_draw_of_the_authors_code_is_not_moved_by_looking_at_it(tmp_path: Path, monkeypatch) -> None:
    """Columns are tried with the author's functions, which may draw: what is judged is what lm-eval draws."""
    (tmp_path / "drawn.py").write_text(
        "import random\n\ndef drawn(row):\n    return {'q': row['q'] + str(random.random())}\n\n"
        "def process(rows):\n    return rows.map(drawn)\n"
    )
    (tmp_path / "drawn.yaml").write_text(
        "task: drawn\ndataset_path: me/drawn\ntest_split: test\nprocess_docs: !function drawn.process\n"
        "output_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: a\n"
    )
    found = [{"q": "x", "a": "y"}, {"q": "z", "a": "y"}]
    write(tmp_path, {"drawn": found})
    rows = datasets.Dataset.from_list(found)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"test": rows}))
    documents = []
    for data_dir in (None, str(tmp_path)):
        with seeded():
            loaded, _ = tasks.load(["drawn"], str(tmp_path), data_dir=data_dir)
            documents.append([row["q"] for row in loaded["tasks"]["drawn"].eval_docs])
    assert documents[0] == documents[1] and documents[0][0] != "x"


def test_tasks_with_files_need_no_hub(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not asked for rows, commits or downloads, and a plan counts the rows that there are."""
    monkeypatch.setattr(task_data, "_hub_answers", lambda: pytest.fail("the hub was asked"))
    names = list(ROWS)
    assert task_data.task_datasets(names, None, folder) == [] and len(task_data.task_datasets(names)) == 8
    assert task_data.task_commits(names, None, folder) == {}
    task_data.require_task_data(names, None, folder)
    assert {task_data.place(name, None, folder) for name in names} == {"files"}
    with composed("evaluation=small", f"evaluation.data_dir={folder}") as cfg:
        config = resolve(cfg)
    assert _task_data(config) == []
    assert estimated(config).unknown == []


def test_a_key_holds_what_is_read_and_no_path(folder: str, tmp_path: Path) -> None:
    """The same rows elsewhere, and files of other tasks beside them, are the same key; another row is another."""
    store, node = Store(tmp_path / "store"), {"tasks": ["piqa", "copa"], "data_dir": folder}
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / "arc_easy.jsonl").unlink()

    def keys(data_dir: Any) -> tuple[list[str], Any]:
        given = {**node, "data_dir": str(data_dir)}
        return [file.key for file in read_by(store, given)], keyed_rows(store, {"inner": given})

    assert keys(moved) == keys(folder) and str(tmp_path) not in json.dumps(keys(moved))
    (moved / "piqa.jsonl").rename(moved / "piqa.validation.jsonl")
    assert keys(moved) != keys(folder)
    (moved / "piqa.validation.jsonl").rename(moved / "piqa.jsonl")
    write(moved, {"copa": ROWS["copa"][:2]})
    assert keys(moved) != keys(folder)


def test_what_others_wrote_is_keyed_by_every_file_that_its_settings_name(tmp_path: Path) -> None:
    """At any depth and under any name; ours by those that it reads."""
    store, files = Store(tmp_path / "store"), [tmp_path / name for name in ("a.csv", "b.csv")]
    node = {"_target_": "mine.rows", "file": str(files[0]), "more": {"parts": [str(files[1])]}, "long": "x" * 5000}
    for file in files:
        file.write_text("1")
    keys = [made.key for made in read_by(store, node)]
    for file in files:
        file.write_text("2")
        assert keys != (keys := [made.key for made in read_by(store, node)])
    assert read_by(store, {**node, "_target_": "sddx.data.sources.jsonl"}) == []


def test_the_data_of_tasks_is_keyed_wherever_it_lies(tmp_path: Path) -> None:
    """That of a user's folder beside it; the package's own tasks where one of these is asked for."""
    (tmp_path / "tasks").mkdir()
    (rows := tmp_path / "rows.jsonl").write_text('{"q": "a", "a": "b"}\n')
    (tmp_path / "tasks" / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
    )
    store, node = Store(tmp_path / "store"), {"tasks": ["mine"], "include": str(tmp_path / "tasks")}
    *before, row = [file.key for file in read_by(store, node)]
    rows.write_text('{"q": "a", "a": "c"}\n')
    *after, other = [file.key for file in read_by(store, node)]
    assert before == after and row != other
    assert [file.path for file in read_by(store, {"tasks": ["tiny_facts"]})] == [tasks.OWN_TASKS]
    local = {"tasks": ["piqa"], "data_dir": write(tmp_path / "in", {"piqa": ROWS["piqa"]})}
    assert [file.stage for file in read_by(store, local)] == ["task_rows"]


def test_sides_are_disjoint_and_hang_on_the_item_alone() -> None:
    """About seven of nine; rows before, behind and of other tasks, and further columns, move none."""
    rows = [{"goal": f"do {n}", "sol1": f"so {n}", "sol2": "not", "label": n % 2} for n in range(1838)]
    sides = [items.side_of("piqa", f"{row['goal']}\n{row['sol1']}\nnot") for row in rows]
    assert 1400 <= sides.count("report") <= 1460  # binomial: 1,430, deviation 17.8
    assert sides == [items.side_of("piqa", f"{row['goal']}\n{row['sol1']}\nnot") for row in rows]
    assert sides != [items.side_of("copa", f"{row['goal']}\n{row['sol1']}\nnot") for row in rows]


def of_side(side: str, folder: Path, rows: list[dict], limit: int | None = None, task: str = "piqa") -> set[str]:
    write(folder, {task: rows})
    cluster = settings()["cluster"]
    texts = task_texts([task], None, limit, None, data_dir=str(folder), side=side, cluster=cluster)[task]
    assert len(texts) == len(set(texts))
    return set(texts)


def test_no_row_moves_another_to_the_other_side(tmp_path: Path) -> None:
    rows = [{"goal": f"do {n}", "sol1": f"so {n}", "sol2": "not", "label": n % 2} for n in range(90)]
    report, selection = (of_side(side, tmp_path, rows) for side in items.SIDES)
    assert not report & selection and len(report | selection) == 90
    more = [{**row, "goal": f"then {row['goal']}"} for row in rows[:20]] + rows[::-1]
    more = [{**row, "source": "me"} for row in more]
    assert report < of_side("report", tmp_path, more) and selection < of_side("selection", tmp_path, more)
    assert len(of_side("selection", tmp_path, rows, limit=9)) == 9
    assert of_side("selection", tmp_path, rows, limit=9) < of_side("selection", tmp_path, rows, limit=12)
    with pytest.raises(
        UserError, match="No item of the task 'piqa' is on the side side=selection; it has 1 in all"
    ):
        alone = next(row for row in rows if any(f"\n{row['sol1']}\n" in text for text in report))
        of_side("selection", tmp_path, [alone])


def test_questions_on_one_passage_are_on_one_side(tmp_path: Path) -> None:
    rows = [{"passage": f"lake {n // 3}", "question": f"is it {n}", "idx": n, "label": n % 2} for n in range(180)]
    found = [of_side(side, tmp_path, rows, task="boolq") for side in items.SIDES]
    passages = [{text.partition("\n")[0] for text in side} for side in found]
    assert not passages[0] & passages[1] and len(passages[0] | passages[1]) == 60
    assert all(len(side) == 3 * len(shared) for side, shared in zip(found, passages, strict=True))


def test_sentences_that_are_the_same_up_to_the_gap_are_on_one_side(tmp_path: Path) -> None:
    """Told from one another by their ends, in which no number gives the answer away."""
    rows = [
        {
            **ROWS["winogrande"][0],
            "sentence": f"{n // 2} cats saw Ann and Eve since _ had {n} eggs.",
            "answer": str(n % 2 + 1),
        }
        for n in range(90)
    ]
    found = [of_side(side, tmp_path, rows, task="winogrande") for side in items.SIDES]
    stems = [{text.partition(" cats")[0] for text in side} for side in found]
    assert not stems[0] & stems[1] and [len(side) for side in found] == [2 * len(each) for each in stems]
    first, second = ROWS["winogrande"][:2]
    write(tmp_path, {"winogrande": [first, {**first, "answer": "1"}, second]})
    texts = task_texts(["winogrande"], None, None, None, data_dir=str(tmp_path))["winogrande"]
    start, end = first["sentence"].split("_")
    assert texts[0] == texts[1] == f"{start}Ann {end.strip()}\n{start}Eve {end.strip()}" != texts[2]


def test_both_files_of_small_share_the_items_and_nothing_else() -> None:
    report, selection = settings(), settings(group="small_selection")
    assert {key for key in report if report[key] != selection[key]} == {"side", "limit"}
    assert (report["side"], selection["side"]) == ("report", "selection")
    assert set(report["primary"]) == set(report["chance"]) == set(report["tasks"]) > set(report["apart"])


def test_a_metric_looks_at_the_side_that_the_report_leaves_out(folder: str) -> None:
    given: dict[str, Any] = {"tasks": ["piqa"], "limit": None, "data_dir": folder}
    assert TaskScore(**given, side="selection").side == "selection"
    assert TaskScore(**given, side="selection", oracle=True).side == "report"
    TaskScore(**given, side="selection").require()
    with pytest.raises(UserError, match="side=selection"):
        TaskScore(**given)


def log_p(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """log p(answer | prompt) in float64, one row at a time."""
    context, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    with torch.no_grad():
        steps = model(torch.tensor([ids])).logits.double()[0].log_softmax(-1)
    return sum(float(steps[place - 1, ids[place]]) for place in range(len(context), len(ids)))


def test_likelihood_measures_by_hand(model, tokenizer, folder: str) -> None:
    """From the model's own logits: of a task with choices, one whose contexts are the choices, one without."""
    names = ["piqa", "lambada_openai", "winogrande"]
    asked = {"data_dir": folder, "chat_template": False, "primary": {"lambada_openai": "acc,none"}}
    found = evaluate(model, tokenizer, QUIET, tasks=names, **asked)["tasks"]
    by_hand: dict[str, list] = {name: [] for name in names}
    for row in ROWS["piqa"]:
        scores = [
            log_p(model, tokenizer, f"Question: {row['goal']}\nAnswer:", f" {row[s]}") for s in ("sol1", "sol2")
        ]
        answer = f" {row['sol1' if row['label'] == 0 else 'sol2']}"
        by_hand["piqa"].append((scores[row["label"]], answer, scores[row["label"]] - scores[1 - row["label"]]))
    for row in ROWS["lambada_openai"]:
        prompt, _, word = row["text"].rpartition(" ")
        by_hand["lambada_openai"].append((log_p(model, tokenizer, prompt, f" {word}"), f" {word}", None))
    for row in ROWS["winogrande"]:
        start, rest = row["sentence"].split("_")
        scores = [log_p(model, tokenizer, start + row[o], rest) for o in ("option1", "option2")]
        right = int(row["answer"]) - 1
        by_hand["winogrande"].append((scores[right], rest, scores[right] - scores[1 - right]))
    for name, items_by_hand in by_hand.items():
        for sample, (score, answer, margin) in zip(found[name]["samples"], items_by_hand, strict=True):
            bits = -score / math.log(2) / len(answer.encode())
            assert sample["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
            assert sample["margin"] == (None if margin is None else pytest.approx(margin, abs=1e-4))
        means = [sample["bits_per_byte"] for sample in found[name]["samples"]]
        assert found[name]["bits_per_byte"] == pytest.approx(np.mean(means))
    assert found["lambada_openai"]["margin"] is None


def test_the_precision_to_expect_knows_clusters_and_what_stands_apart(folder: str) -> None:
    """Five questions on three passages are as sure as 25 / 9 items at least; the average is that of PIQA."""
    loaded, part_of = tasks.load(["piqa", "boolq"], None, data_dir=folder)
    tasks.tell(loaded["tasks"], part_of, {"cluster": {"boolq": "passage"}})
    said = _precision(loaded["tasks"], part_of, None, ["boolq"])
    piqa, boolq = (100 * 1.96 * math.sqrt(0.25 / count) for count in (5, 25 / 9))
    assert f"piqa {piqa:.1f}, boolq {boolq:.1f}, average {piqa:.1f}" in said and said.startswith("10 items.")


def test_items_know_their_cluster(model, tokenizer, folder: str) -> None:
    """Two questions on a passage are one draw, and errors say so; scores are as they were."""
    asked = {"tasks": ["boolq"], "data_dir": folder, "chat_template": False}
    found, plain = (evaluate(model, tokenizer, QUIET, cluster=c, **asked) for c in ({"boolq": "passage"}, None))
    clusters = compact(found)["boolq"]["clusters"]
    assert [clusters.index(each) for each in clusters] == [0, 0, 2, 2, 4]
    assert compact(plain)["boolq"]["clusters"] is None
    assert compact(found)["boolq"]["scores"] == compact(plain)["boolq"]["scores"]
    assert found["tasks"]["boolq"]["stderr"] != plain["tasks"]["boolq"]["stderr"]


def test_items_without_a_cluster_are_draws_by_themselves(model, tokenizer, tmp_path: Path) -> None:
    """Of passages that are null or empty, each is its own; the others are one draw as before."""
    passages = ["a lake", None, "a lake", "", None]
    rows = [{**row, "passage": passage} for row, passage in zip(ROWS["boolq"], passages, strict=True)]
    asked = {"tasks": ["boolq"], "data_dir": write(tmp_path, {"boolq": rows}), "cluster": {"boolq": "passage"}}
    clusters = compact(evaluate(model, tokenizer, QUIET, chat_template=False, **asked))["boolq"]["clusters"]
    assert [clusters.index(each) for each in clusters] == [0, 1, 0, 3, 4]
    loaded, part_of = tasks.load(["boolq"], None, data_dir=str(tmp_path))
    tasks.tell(loaded["tasks"], part_of, {"cluster": asked["cluster"]})
    task = loaded["tasks"]["boolq"]
    assert items.own(task, task.eval_docs[1]) == tasks.text_of(task, task.eval_docs[1])


def test_a_run_by_files_ends_and_is_found_again_elsewhere(tmp_path: Path) -> None:
    """The embedded model, pruned and trained, on made-up rows: what stands apart is in no average, every model has
    its likelihoods, and the same rows in another folder are nothing to build."""
    first = write(tmp_path / "first")
    shutil.copytree(first, tmp_path / "second")
    configs = []
    for name in ("first", "second"):
        given = (f"store={tmp_path / 'store'}", "evaluation=small", f"evaluation.data_dir={tmp_path / name}")
        more = ("evaluation.side=null", "evaluation.limit=3", "evaluation.batch_size=8", "loss=sft")
        small = [each for each in SMALL if not each.startswith("evaluation")]
        with composed(*small, *given, *more, out=tmp_path / f"out {name}") as cfg:
            configs.append(resolve(cfg))
    summary = json.loads(run(configs[0], tmp_path / "out first").read_text())
    scores, counted = summary["scores"]["recovered"], ["arc_easy", "piqa", "hellaswag", "lambada_openai"]
    assert summary["apart"] == ["boolq", "copa", "openbookqa", "winogrande"] and set(summary["apart"]) < set(scores)
    assert scores["average"] == pytest.approx(np.mean([scores[task] for task in counted]))
    for of in summary["likelihoods"].values():
        assert of["bits_per_byte"].keys() == scores.keys()
        assert of["bits_per_byte"]["average"] == pytest.approx(np.mean([of["bits_per_byte"][t] for t in counted]))
        assert of["margin"].keys() == scores.keys() - {"lambada_openai"}
    table = (tmp_path / "out first" / "table.md").read_text()
    assert "boolq (apart)" in table and "bits per byte, right answers: unpruned" in table
    assert all(step.present for step in look(configs[1]).steps if step.stage != "report")


def real() -> str:
    folder = os.environ.get("SDDX_REAL_DATA")
    if not folder:
        pytest.skip("SDDX_REAL_DATA names no folder of real data")
    return str(Path(folder) / "tasks")


def test_the_real_rows_of_every_task_can_be_evaluated() -> None:
    """All eight, every document; as many items as small asks for where there are that many."""
    given = settings(f"evaluation.data_dir={real()}")
    read = ("tasks", "include", "split", "shots", "primary", "chance", "limit", "cluster", "apart", "data_dir")
    require_tasks(**{key: given[key] for key in read})
    loaded, part_of = tasks.load(given["tasks"], None, data_dir=given["data_dir"])
    tasks.tell(loaded["tasks"], part_of, {"cluster": given["cluster"]})
    with _calm(True):  # as an evaluation draws: templates are compiled once
        report, selection = (items.draw(loaded["tasks"], part_of, None, side) for side in items.SIDES)
    assert report is not None and selection is not None
    for name, task in loaded["tasks"].items():
        total = len(task.eval_docs)
        assert not {*report[name]} & {*selection[name]} and len(report[name]) + len(selection[name]) == total
        assert 0.7 < len(report[name]) / total < 0.83
    assert len(report["piqa"]) >= 1400 and len(selection["piqa"]) >= 400
    labels = [row["label"] for row in loaded["tasks"]["boolq"].eval_docs]
    assert given["chance"]["boolq"] == pytest.approx(sum(labels) / len(labels), abs=1e-4)


def test_real_rows_score_as_lm_eval_scores_them(model, tokenizer, tmp_path: Path, monkeypatch) -> None:
    names, rows = list(ROWS), {}
    for name in names:
        lines = (Path(real()) / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:6]
        rows[name] = [json.loads(line) for line in lines]
    asked = {"tasks": names, "data_dir": write(tmp_path, rows), "chat_template": False, "batch_size": 4}
    asked["primary"] = {"lambada_openai": "acc,none"}
    require_same(evaluate(model, tokenizer, QUIET, **asked), by_lm_eval(model, tokenizer, names, rows, monkeypatch))
