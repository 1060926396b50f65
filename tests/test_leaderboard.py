"""The leaderboard's tasks by lm-eval's own files, on made-up rows in the shape of the real data; and what is said
where the real data is not there. No network is used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import httpx
import pytest
import torch
import yaml
from composing import composed, resolve
from datasets.packaged_modules.cache.cache import _find_hash_in_cache
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sddx.config import CONF
from sddx.config.build import build
from sddx.errors import UserError
from sddx.evaluation import task_data, tasks
from sddx.evaluation.harness import evaluate
from sddx.evaluation.recovery import summarise
from sddx.evaluation.scored import compact
from sddx.evaluation.task_data import described, task_datasets
from sddx.hub import unpacked
from sddx.importance.coalitions import TaskScore
from sddx.importance.score import Subject
from sddx.records import Units
from sddx.report.paired import check_comparable
from sddx.runtime import Runtime
from sddx.stages.inputs import read_by
from sddx.store import Store

FULL = yaml.safe_load((CONF / "evaluation" / "full.yaml").read_text())
SPLITS = ("train", "dev", "validation", "test")
ROWS = 30  # more than the 25 examples of ARC


def row(path: str, number: int, stride: int = 1) -> dict:
    """One row with the columns of a hub dataset; no two strides have one in common."""
    words = [f"w{(number + stride * step) % 40}" for step in range(4)]
    gold = number % 4
    targets = {"choices": words, "labels": [1, 0, 0, 0]}
    return {
        "allenai/ai2_arc": {
            "question": words[0], "choices": {"text": words, "label": list("ABCD")}, "answerKey": "ABCD"[gold],
        },
        "Rowan/hellaswag": {
            "activity_label": words[0], "ctx_a": words[1], "ctx_b": words[2], "endings": words, "label": str(gold),
        },
        "truthfulqa/truthful_qa": {
            "question": words[0], "mc1_targets": targets, "mc2_targets": targets,
        },
        "cais/mmlu": {"question": " ".join(words), "choices": words, "answer": gold},
        "allenai/winogrande": {
            "sentence": f"{words[0]} _ {words[1]}", "option1": words[2], "option2": words[3],
            "answer": str(1 + number % 2),
        },
        "openai/gsm8k": {"question": " ".join(words), "answer": f"{words[0]} #### {number}"},
    }[path]  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """What is loaded from the hub, for which made-up rows stand in."""
    seen: list[tuple[str, str | None]] = []

    def load_dataset(path: str, name: str | None = None, **settings: object) -> datasets.DatasetDict:
        seen.append((path, name))
        rows = {
            split: [row(path, number, stride) for number in range(ROWS)] for stride, split in enumerate(SPLITS, 1)
        }
        return datasets.DatasetDict({split: datasets.Dataset.from_list(found) for split, found in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return seen


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<end>", "Question:", "Answer:", "####", *(f"w{number}" for number in range(40))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_the_leaderboard_is_what_its_file_says(model, tokenizer, asked: list) -> None:
    """Six reported tasks with the leaderboard's shots and metrics, of lm-eval's own definitions; MMLU is 57
    subjects that count equally; the strict score of GSM8K is the primary one and the flexible one is kept."""
    with composed("evaluation=quick", "evaluation.limit=114", "evaluation.max_new_tokens=4") as cfg:
        evaluation = resolve(cfg)["evaluation"]
    results = build(evaluation)(model, tokenizer, Runtime(quiet=True))
    assert list(dict.fromkeys(asked)) == task_datasets(FULL["tasks"]) and len(set(asked)) == 62
    records = results["tasks"]
    parts = {name: [r for r in records.values() if r["part_of"] == name] for name in FULL["tasks"]}
    assert [len(parts[name]) for name in FULL["tasks"]] == [1, 1, 1, 57, 1, 1]
    assert {record["n"] for record in parts["mmlu"]} == {2} and records["hellaswag"]["n"] == ROWS
    for name, of_task in parts.items():
        for record in of_task:
            assert record["settings"]["shots"] == FULL["shots"][name]
            assert record["settings"]["primary"] == FULL["primary"][name]
            assert record["settings"]["chat_template"] is None and record["chance"] == FULL["chance"][name]
    assert records["gsm8k"]["metrics"].keys() == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert {"mmlu", "mmlu_stem", "mmlu_humanities"} <= results["groups"].keys()
    assert results["truncated"] == 0
    _is_summarised(results)


def _is_summarised(results: dict) -> None:
    """One row for each of the six, MMLU the mean of its subjects; without a chance level for one of them there is
    no recovery above chance."""
    samples = json.loads(json.dumps(compact(results)))
    scores = {"unpruned": {task: record["scores"] for task, record in samples.items()}}
    scores["recovered"] = scores["unpruned"]
    part_of = {task: record["part_of"] for task, record in samples.items()}
    levels = {task: record["chance"] for task, record in samples.items()}
    found = summarise(scores, chance=levels, part_of=part_of, replicates=50)
    assert found["scores"]["unpruned"].keys() == {*FULL["tasks"], "average"}
    subjects = [r["score"] for r in results["tasks"].values() if r["part_of"] == "mmlu"]
    assert found["scores"]["unpruned"]["mmlu"] == pytest.approx(sum(subjects) / 57)
    assert found["recovery"] == 1 and found["recovery_above_chance"] is None
    known = summarise(scores, chance=levels | {"truthfulqa_mc2": 0.0}, part_of=part_of, replicates=50)
    assert known["recovery_above_chance"] == pytest.approx(1)


def test_quick_is_full_on_fewer_items() -> None:
    """Nothing but the limit differs, and it names every task."""
    configs = []
    for name in ("full", "quick"):
        with composed(f"evaluation={name}") as cfg:
            configs.append(resolve(cfg)["evaluation"])
    full, quick = configs
    assert list(quick["limit"]) == quick["tasks"]
    assert full == quick | {"limit": None}


SELECTION = yaml.safe_load((CONF / "evaluation" / "selection.yaml").read_text())


def configured(**of: object) -> dict:
    """The loaded tasks of evaluation=selection, with these settings in place of its own."""
    settings = FULL | SELECTION | of
    loaded, part_of = tasks.load(settings["tasks"], None, settings["split"])
    tasks.configure(loaded["tasks"], part_of, shots=settings["shots"], max_new_tokens=None, metadata={})
    return loaded["tasks"]


def examples(task: object, item: dict, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What lm-eval shows before an item."""
    drawn, sample = [], task.sampler.sample
    with monkeypatch.context() as patched:
        patched.setattr(
            task.sampler, "sample", lambda **how: [drawn.append(each) or each for each in sample(**how)]
        )
        task.fewshot_context(item, task.get_config("num_fewshot"))
    return drawn


def test_selection_items_are_other_items(asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from the split that the file names, none is reported, and none is shown among its own examples,
    which are as many as the leaderboard's and from where its are."""
    chosen, reported = configured(), configured(split=None)
    assert chosen.keys() == reported.keys() and len(chosen) == 60
    for name in ("arc_challenge", "hellaswag", "winogrande", "mmlu_virology"):
        task, other = chosen[name], reported[name]
        asked_for = "mmlu" if name.startswith("mmlu") else name
        rows = task.dataset[SELECTION["split"][asked_for]]
        items, reports = list(task.eval_docs), list(other.eval_docs)
        assert items == list(task.config.process_docs(rows) if task.config.process_docs else rows)
        assert not [item for item in items if item in reports]
        for item in items:
            shown = examples(task, item, monkeypatch)
            assert len(shown) == FULL["shots"][asked_for] and item not in shown
            assert all(example in other.sampler.df for example in shown)


def test_selection_is_never_compared_with_a_report(model, tokenizer, asked: list) -> None:
    """The names of tasks are the same, and so are the metrics; what was judged is not."""
    found = []
    for split in ({"arc_challenge": "validation"}, None):
        with composed("evaluation=selection", "evaluation.tasks=[arc_challenge]") as cfg:
            evaluation = resolve(cfg)["evaluation"] | {"split": split}
        found.append(compact(build(evaluation)(model, tokenizer, Runtime(quiet=True))))
    with pytest.raises(UserError, match="arc_challenge: split is validation and test") as refused:
        check_comparable(*found)
    assert "0 in common" in str(refused.value)
    check_comparable(found[0], found[0])


def test_a_metric_can_look_at_another_split(model, tokenizer, asked: list) -> None:
    """As the evaluation does: the same items, with as many examples."""
    settings = {"shots": {"arc_challenge": 2}, "split": {"arc_challenge": "validation"}, "limit": 6}
    value = TaskScore(tasks=["arc_challenge"], **settings)
    (seen,) = value.of(Subject(model, tokenizer, Units("blocks", 1), [], Runtime(quiet=True)), [(True,)])
    found = evaluate(
        model, tokenizer, Runtime(quiet=True), tasks=["arc_challenge"], chat_template=False, **settings
    )
    assert seen.tolist() == [sample["score"] for sample in found["tasks"]["arc_challenge"]["samples"]]
    assert len(seen) == 6 and found["tasks"]["arc_challenge"]["settings"]["split"] == "validation"


def test_a_split_that_the_data_lacks_is_named(asked: list) -> None:
    with pytest.raises(UserError, match=r"'winogrande' has no split 'valid'; it has train, dev, validation, test"):
        configured(tasks=["winogrande"], split={"winogrande": "valid"})


def test_selection_differs_from_full_in_its_items_alone() -> None:
    """Every task with a split has items for choosing, and the report's settings."""
    with composed("evaluation=full") as cfg:
        full = resolve(cfg)["evaluation"]
    with composed("evaluation=selection") as cfg:
        chosen = resolve(cfg)["evaluation"]
    assert {path for path, _ in task_datasets(chosen["tasks"])} == {
        "allenai/ai2_arc", "Rowan/hellaswag", "cais/mmlu", "allenai/winogrande",
    }  # fmt: skip
    assert list(chosen["split"]) == list(chosen["limit"]) == chosen["tasks"]
    assert {**chosen, "tasks": full["tasks"], "limit": None, "split": None} == full


PLAIN = (
    "dataset_path: me/plain\ntest_split: test\noutput_type: generate_until\n"
    "doc_to_text: question\ndoc_to_target: answer\n"
)
FILES = {
    "plain.yaml": PLAIN + "task: plain\ntag: both\n",
    "named.yaml": "include: plain.yaml\ntask: named\ndataset_name: sub\ntag: both\ndescription: Answer.\n",
    "local.yaml": PLAIN + "task: local\ndataset_path: json\ndataset_kwargs: {data_files: {test: x.json}}\n",
    "own.yaml": PLAIN + "task: own\ncustom_dataset: !function sddx.evaluation.harness.json_lines\n"
    "dataset_kwargs: {data_files: {test: own.jsonl}}\n",
    "own.jsonl": '{"question": "a", "answer": "b"}\n',
    "inner.yaml": "group: inner\ntask: [both, local]\n",
    "outer.yaml": "group: outer\ntask:\n  - inner\n  - own\n  - {task: plain, dataset_name: other}\n",
    "over.yaml": "group: over\ntask: [named]\ndataset_path: me/elsewhere\n",
    "inline.yaml": "group: inline\ntask:\n  - {group: sub, task: [plain], dataset_name: deep}\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    return str(tmp_path)


@pytest.mark.parametrize(
    "task, expected",
    [
        ("plain", {("me/plain", None)}),
        ("both", {("me/plain", None), ("me/plain", "sub")}),
        ("inner", {("me/plain", None), ("me/plain", "sub")}),
        ("outer", {("me/plain", None), ("me/plain", "sub"), ("me/plain", "other")}),
        ("over", {("me/elsewhere", "sub")}),
        ("inline", {("me/plain", "deep")}),
        ("local", set()),
        ("own", set()),
    ],
)
def test_datasets_are_those_that_lm_eval_loads(
    folder: str, task: str, expected: set, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through tags, nested groups and what groups override, without loading any; and descriptions as well."""
    seen: set = set()

    def load_dataset(path: str, name: str | None = None, **settings: object) -> datasets.DatasetDict:
        seen.add((path, name))
        return datasets.DatasetDict(test=datasets.Dataset.from_list([{"question": "a", "answer": "b"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert set(task_datasets([task], folder)) == expected
    told = described([task], folder)
    assert not seen
    loaded = tasks.load([task], folder)[0]["tasks"].values()
    assert told == [task] * any(each.get_config("description") for each in loaded)
    assert seen - {("json", None)} == expected


def test_the_packages_own_tasks_need_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_data, "task_manager", lambda *given: pytest.fail("the index was read"))
    monkeypatch.setattr(task_data, "_hub_answers", lambda: pytest.fail("the hub was asked"))
    task_data.require_task_data(["tiny_arithmetic", "tiny_facts_selection"])
    assert described(["tiny_arithmetic", "tiny_facts_selection"]) == []
    assert not any("description" in yaml.read_text() for yaml in tasks.OWN_TASKS.glob("*.yaml"))


def cached(root: Path, path: str, subset: str, commit: str = "abc") -> None:
    """What `datasets` leaves in its cache."""
    folder = root / path / subset / "0.0.0" / commit
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"config_name": subset}))


def test_the_cache_is_read_as_datasets_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Present and absent subsets, and of two commits the newest, as the library's own search of its cache finds
    them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    for age, commit in enumerate(("new", "a_old", "z_older")):
        cached(tmp_path, "me___camel_case", "main", commit)
        os.utime(tmp_path / "me___camel_case" / "main" / "0.0.0" / commit, (10**9 - age, 10**9 - age))
    cached(tmp_path, "me___other", "default")
    for path, name in [("me/CamelCase", "main"), ("me/CamelCase", None), ("me/CamelCase", "x"), ("me/other", None),
                       ("me/nothing", None)]:  # fmt: skip
        try:
            commits = [_find_hash_in_cache(path, name, None, {}, None)[2]]
        except ValueError:
            commits = []
        assert [found.name for found in unpacked(path, name)][-1:] == commits, (path, name)


def test_evaluations_are_keyed_by_the_commit_of_their_data(
    folder: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's, and without one that of the rows in the cache: the same where these are the newest. Tasks whose
    data is in files have none."""
    tmp_path = tmp_path_factory.mktemp("apart")  # `folder` is read as a whole
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    answers, main = [True], ["1" * 40]
    monkeypatch.setattr(task_data, "_hub_answers", lambda: answers[0])
    monkeypatch.setattr(task_data, "current_commit", lambda path, revision: main[0])
    store = Store(tmp_path / "store")

    def keys(task: str = "both") -> list[str]:
        return [made.key for made in read_by(store, {"tasks": [task], "include": folder})]

    assert len(keys("local")) == len(keys("own")) == len(keys()) - 1
    online = keys()
    for subset in ("default", "sub"):
        cached(tmp_path / "cache", "me___plain", subset, "1" * 40)
    answers[0] = False
    assert keys() == online
    cached(tmp_path / "cache", "me___plain", "sub", "2" * 40)
    os.utime(tmp_path / "cache" / "me___plain" / "sub" / "0.0.0" / ("1" * 40), (0, 0))
    later = keys()
    assert later != online
    answers[0], main[0] = True, "3" * 40
    assert keys() not in (online, later)


def test_missing_data_is_named_where_the_hub_is_out_of_reach(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command that fetches it; a hub that answers, or a full cache, is no mistake."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    answers = [False]
    monkeypatch.setattr(task_data, "_hub_answers", lambda: answers[0])
    with pytest.raises(UserError, match=r"not here: me/plain \(sub, other\).*sddx fetch"):
        task_data.require_task_data(["outer"], folder)
    assert task_data._named([("me/many", str(n)) for n in range(57)]) == "me/many (0, 1, 2 and 54 more)"
    answers[0] = True
    task_data.require_task_data(["outer"], folder)
    answers[0] = False
    for subset in ("default", "sub", "other"):
        cached(tmp_path / "cache", "me___plain", subset)
    task_data.require_task_data(["outer"], folder)


def test_the_hub_is_asked_once_and_not_where_that_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE asks nobody; no connection is no answer, and any status is one."""
    calls: list[float] = []

    class Session:
        failure: Exception | None = httpx.ConnectTimeout("no route")

        def head(self, url: str, *, timeout: float) -> None:
            calls.append(timeout)
            if self.failure:
                raise self.failure

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    for offline, failure, expected in [
        (True, None, (False, 0)), (False, Session.failure, (False, 1)), (False, None, (True, 1)),
    ]:  # fmt: skip
        task_data._hub_answers.cache_clear()
        calls.clear()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(Session, "failure", failure)
        assert task_data._hub_answers() is task_data._hub_answers() is expected[0]
        assert len(calls) == expected[1] and all(patience <= 3 for patience in calls)
    task_data._hub_answers.cache_clear()
