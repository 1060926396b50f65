"""Tasks are tried before any work: what would end an evaluation, or make its scores none, is told in a sentence,
all of it at once, and by the name of its setting."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from composing import composed, resolve

from sddx.errors import UserError
from sddx.evaluation import harness, tasks, trial
from sddx.evaluation.harness import json_lines, require_tasks
from sddx.evaluation.tasks import OWN_TASKS, check_tasks, is_mean, named_in_files
from sddx.importance.ablation import Greedy, Shapley
from sddx.importance.coalitions import Loss, TaskScore
from sddx.stages.check import precheck
from sddx.stages.evaluate.check import check_names

ROW = {"question": "a", "choices": ["x", "y"], "answer": 1}
YAML = {
    "task": "mine",
    "custom_dataset": "!function sddx.evaluation.harness.json_lines",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WRITTEN = {"output_type": "generate_until", "doc_to_choice": None, "metric_list": [{"metric": "exact_match"}]}
Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A folder with the task `mine`: some settings changed, some rows after three good ones."""

    def made(*rows: object, good: int = 3, **settings: object) -> str:
        lines = [f"{key}: {_yaml(value)}" for key, value in (YAML | settings).items() if value is not None]
        (tmp_path / "mine.yaml").write_text("\n".join(lines))
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [ROW] * good + list(rows)))
        return str(tmp_path)

    return made


def _yaml(value: object) -> str:
    return value if isinstance(value, str) and value.startswith("!function") else json.dumps(value)


def refused(include: str, **settings: object) -> str:
    with pytest.raises(UserError) as told:
        require_tasks("here", **{"tasks": ["mine"], "include": include} | settings)
    return str(told.value)


def test_lines_of_json_end_at_line_feeds_alone(make: Make, tmp_path: Path) -> None:
    """U+2028, U+2029, U+0085 and form feeds are text; blank lines and a begin mark of the file are nothing."""
    texts = ["a\u2028b", "\u2029", "c\u0085d", "e\x0bf", "\x1c"]
    lines = [json.dumps({"question": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\r\n\n".join(lines), encoding="utf-8", newline="")
    found = json_lines(data_files={"test": "rows.jsonl"}, config_source=str(tmp_path / "mine.yaml"), version=1)
    assert found["test"]["question"] == texts
    data = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    for place in ({}, {"custom_dataset": None, "dataset_path": "json", "dataset_kwargs": data}):
        folder = make(**place)
        rows = [json.dumps({**ROW, "question": text}, ensure_ascii=False) for text in texts]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
        require_tasks(tasks=["mine"], include=folder)
        assert list(tasks.load(["mine"], folder)[0]["tasks"]["mine"].eval_docs["question"]) == texts


@pytest.mark.parametrize(
    "rows, settings, told",
    [
        ([{**ROW, "answer": 2}], {}, "document 4 of its split 'test': its answer is 2, which is none of its 2"),
        ([{**ROW, "answer": -1}], {}, "its answer is -1, which is none"),
        ([{"question": "a", "choices": ["x"]}] * 2, {}, "document 4 .* its answer is None.* and so with 1 more"),
        ([{**ROW, "choices": []}], {}, "document 4 .* its choices are .*must be a list of texts"),
        ([{**ROW, "choices": ["x", ""]}], {}, "document 4 .* must be a list of texts, none of them empty"),
        ([{**ROW, "question": None}], {}, "document 4 .* its prompt is None, and must be a text"),
        ([], {"doc_to_text": "choices"}, r"document 1 .* its prompt is \['x', 'y'\].* and so with 2 more"),
        ([{**ROW, "question": ""}], {"doc_to_text": "{{question[0]}}"}, "document 4 .*UndefinedError"),
        ([], {"doc_to_text": "{{nope}}"}, "UndefinedError: 'nope' is undefined. Its file is .*mine"),
        ([{"question": "a"}], WRITTEN | {"doc_to_target": "answer"}, "document 4 .* its answer is None"),
        ([{**ROW, "answer": 3}], WRITTEN | {"doc_to_target": "{{choices if answer==1 else 'a'}}"}, "has a list"),
        ([], {"output_type": "loglikelihood", "metric_list": None, "doc_to_choice": None}, "its answer is 1"),
        ([[1]], {}, "rows.jsonl, row 4: no object with columns"),
        ([{**ROW, "answer": "b"}], {}, "rows.jsonl is no table: "),
        ([], {"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}, "no.jsonl is not there"),
        ([], {"custom_dataset": None, "dataset_kwargs": None}, "names no data"),
        ([], {"doc_to_text": "!function nope.nope"}, "No module named 'nope'"),
        ([], {"unsafe_code": True}, "runs code that a model has written"),
        ([], {"num_fewshot": 3, "fewshot_split": "test"}, "3 examples .* 2 documents .* besides"),
        ([], WRITTEN | {"filter_list": [{"name": "n", "filter": [{"function": "nope"}]}]}, "loaded.*nope"),
    ],
)  # fmt: skip
def test_what_no_document_may_lack_is_told(make: Make, rows: list, settings: dict, told: str) -> None:
    message = refused(make(*rows, **settings))
    assert "'mine'" in message and "hub" not in message and re.search(told, message), message


def test_a_sound_task_is_accepted_and_left_as_it_was(make: Make) -> None:
    """Trying it moves neither the draw of its examples nor any global random state."""
    folder, how = make(*[ROW | {"question": str(number)} for number in range(20)]), {"shots": 2}
    require_tasks(
        tasks=["mine"], include=folder, limit=2, chance={"mine": 0.5}, primary={"mine": "acc,none"}, **how
    )
    drawn = []
    for tried in (False, True):
        loaded, part_of = tasks.load(["mine"], folder)
        tasks.configure(loaded["tasks"], part_of, max_new_tokens=None, metadata={}, **how)
        random.seed(3)
        if tried:
            harness._require_sound(loaded["tasks"])
        task = loaded["tasks"]["mine"]
        drawn.append(([task.fewshot_context(item, 2) for item in task.eval_docs], random.random()))
    assert drawn[0] == drawn[1]


def test_the_packages_own_tasks_are_sound() -> None:
    """So that a run of them need not try them."""
    names = sorted(named_in_files([OWN_TASKS]))
    assert len(names) == 16
    assert trial.tried(names, None, "here", dict.fromkeys(("primary", "split", "shots"))) == []


def test_clusters_are_told_by_columns_that_are_there(make: Make) -> None:
    """One column, or a template of several."""
    folder = make()
    for cluster in ("question", "{{question}} {{answer}}"):
        require_tasks(tasks=["mine"], include=folder, cluster={"mine": cluster})
    assert "no column 'nope' to tell its clusters by (here.cluster)" in refused(folder, cluster={"mine": "nope"})
    told = r"cannot tell its clusters by '\{\{nope\}\}' \(here.cluster\): UndefinedError"
    assert re.search(told, refused(folder, cluster={"mine": "{{nope}}"}))


def test_runs_of_the_packages_own_tasks_pay_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "tried", lambda *given: pytest.fail("tasks were loaded"))
    require_tasks(tasks=["tiny_facts", "tiny_arithmetic_selection"], limit=3, chance={"tiny_facts": 0.25})


def test_examples_must_be_there(make: Make) -> None:
    """As many as are asked for, besides the item itself where they come from the split that is judged."""
    folder = make(*({**ROW, "question": word} for word in "abc"), good=0, fewshot_split="test")
    require_tasks(tasks=["mine"], include=folder, shots=2)
    assert "show 3 examples before each item, and has 2 documents" in refused(folder, shots={"mine": 3})
    folder = make(
        dataset_kwargs={"data_files": {"test": "rows.jsonl", "train": "rows.jsonl"}}, training_split="train"
    )
    require_tasks(tasks=["mine"], include=folder, shots=3)
    assert "Set here.shots" in refused(folder, shots=4)


@pytest.mark.parametrize(
    "settings, primary, told",
    [
        ({}, "acc_norm,none", "has no metric 'acc_norm,none'; it has acc,none .here.primary"),
        ({"metadata": {"primary": "f1"}}, None, "has no metric 'f1'"),
        ({"metric_list": [{"metric": "mcc"}]}, None, "'mcc,none', which is not a mean .* It has none"),
        ({"metric_list": [{"metric": "acc"}, {"metric": "f1"}]}, "f1,none", "Set here.primary to .*: acc,none"),
        ({"metric_list": [{"metric": "acc", "aggregation": "median"}]}, None, "'acc,none', which is not a mean"),
        (
            {"output_type": "loglikelihood_rolling", "doc_to_choice": None, "doc_to_target": "question",
             "metric_list": [{"metric": "word_perplexity"}]}, None, "'word_perplexity,none', which is not a mean",
        ),
    ],
)  # fmt: skip
def test_a_score_is_a_mean_over_items(make: Make, settings: dict, primary: str | None, told: str) -> None:
    """Told from documents, and from the YAML alone where the hub has them."""
    given = {"primary": {"mine": primary}} if primary else {}
    assert re.search(told, refused(make(**settings), **given))
    hub = {"custom_dataset": None, "dataset_kwargs": None, "dataset_path": "me/rows"}
    assert re.search(told, refused(make(**hub | settings), **given))


def test_means_are_told_by_what_they_do() -> None:
    assert is_mean(None) and is_mean(lambda scores: sum(scores) / len(scores))
    assert not any(map(is_mean, (max, sum, sorted, lambda pairs: [gold for gold, _ in pairs])))


def test_all_mistakes_are_told_at_once_by_their_settings(make: Make) -> None:
    """Of names and values first; then of all tasks and settings."""
    folder = make({**ROW, "answer": 5})
    Path(folder, "group.yaml").write_text("group: both\ntask: [mine]\n")
    Path(folder, "other.yaml").write_text("include: mine.yaml\ntask: other\n")
    wrong = refused(folder, tasks=["both", "other"], split={"other": "dev"}, shots={"mine": 1}, apart=["mine"])
    assert "'mine' cannot use document 4" in wrong and "here.split: the data of the task 'other' has no" in wrong
    assert "here.shots names 'mine', a part of 'both'" in wrong
    assert "here.apart names 'mine', a part of 'both'" in wrong
    twisted = {"limit": {1: 2, "mine": {"a": 1}}, "primary": {3: "acc", "mine": 4}, "chance": {"mine": "x"}}
    wrong = refused(folder, tasks=["mine", 3, ["mine"], "other", "other"], apart=[5], **twisted)
    for told in (
        "here.tasks names 3,", "here.tasks names ['mine'],", "names other more than once", "here.limit names 1,",
        "here.limit.mine={'a': 1} must be a number", "here.primary names 3,", "here.primary.mine=4 must be a text",
        "here.chance.mine='x' must be a number", "here.apart names 5,",
    ):  # fmt: skip
        assert told in wrong
    assert "here.include=/nowhere is no folder" in refused("/nowhere", tasks=[3])


def test_a_name_that_is_nowhere_is_told_with_its_setting(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with the files that could not be read, which are no mistake where every task is found."""
    monkeypatch.setattr(tasks, "_built_in", set)
    indexed = tasks._indexed
    monkeypatch.setattr(tasks, "_indexed", lambda folders, defaults: indexed(folders, defaults=False))
    folder = Path(make())
    (folder / "latin.yaml").write_bytes("task: caf\u00e9".encode("latin-1"))
    (folder / "link.yaml").symlink_to("nowhere")
    (folder / "loop").symlink_to(".")
    (folder / "folder.yaml").mkdir()
    (folder / "broken.yaml").write_text(": : [")
    require_tasks(tasks=["mine"], include=str(folder))
    given = {"include": str(folder), "setting": "here", "chance": {"mne": 0.5}, "shots": {"nope": 1}}
    with pytest.raises(UserError) as told:
        check_tasks(["mine"], apart=["min"], **given)
    beside, near, far = told.value.args
    assert beside.startswith("here.apart: There is no evaluation task 'min'; near names: mine.")
    assert near.startswith("here.chance: There is no evaluation task 'mne'; near names: mine.")
    assert far.startswith("here.shots: There is no evaluation task 'nope'")
    for passed in (
        "latin.yaml (ReaderError",
        "link.yaml (FileNotFound",
        "folder.yaml (IsADir",
        "broken.yaml (Parser",
    ):
        assert passed in near
    config = {
        "evaluation": {"tasks": ["mine"], "include": str(folder), "apart": ["min"]},
        "dataset": {"trains": ["mine", "nope", ["a"]]},
    }
    told = r"apart: There is no .*'min'.*\n.*dataset.trains names \['a'\].*\n.*dataset.trains: There is no .*'nope'"
    with pytest.raises(UserError, match=told):
        check_names(config)


def test_groups_of_the_user_may_name_lm_evals_own_tasks(make: Make) -> None:
    """So that its index is read for them, too."""
    Path(make(), "group.yaml").write_text("group: outer\ntask: [mine, {group: inner, task: [mine]}]\n")
    index = tasks._indexed((Path(make()),), defaults=False).task_index
    assert tasks._whole(index, ["outer", "mine"]) and not tasks._whole(index, ["outer", "gsm8k"])
    Path(make(), "more.yaml").write_text("group: more\ntask: [outer, gsm8k]\n")
    index = tasks._indexed((Path(make()), OWN_TASKS), defaults=False).task_index
    assert not tasks._whole(index, ["more"])


def test_tasks_of_a_metric_are_checked_by_their_own_settings() -> None:
    """What is given for a task holds for its selection items."""
    with pytest.raises(UserError, match="pruning.metric.value.tasks names 1,"):
        TaskScore(tasks=[1], limit=None)
    value = TaskScore(tasks=["tiny_facts"], limit=4, shots={"tiny_facts": 151}, primary={"tiny_facts": "nope"})
    assert value.shots == {"tiny_facts_selection": 151} and value.primary == {"tiny_facts_selection": "nope"}
    with pytest.raises(UserError, match="151 examples .*Set pruning.metric.value.shots"):
        value.require()
    with pytest.raises(UserError, match="'tiny_facts' has no split 'nope'") as told:
        TaskScore(tasks=["tiny_facts"], limit=4, split={"tiny_facts": "nope"}).require()
    assert str(told.value).startswith("pruning.metric.value.split")
    with pytest.raises(UserError, match="pruning.metric.value.include=/nowhere"):
        TaskScore(tasks=["tiny_facts"], limit=4, include="/nowhere")


def test_metrics_say_how_many_units_they_can_measure() -> None:
    Greedy(value=Loss(), until=11).require(12)
    with pytest.raises(UserError, match="pruning.metric.until=12, but there are 12 units"):
        Greedy(value=Loss(), until=12).require(12)
    value = TaskScore(tasks=["tiny_facts"], limit=1)
    Shapley(value=value, keep=0.1).require(12)
    Shapley(value=Loss(), keep=0).require(12)
    without = "pruning.metric.keep=0 asks for tasks' scores without any unit"
    with pytest.raises(UserError, match=without):
        Shapley(value=value, keep=0).require(12)
    with composed("stages=[score]", "+pruning/metric@metrics.s=shapley_task", "metrics.s.keep=0") as cfg:
        asked = resolve(cfg)
    with pytest.raises(UserError, match=without):
        precheck(asked, download=False, stages=["score"])
