"""Rows of users: what is trained is what a row says, all else is told or refused before any work."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from composing import SMALL, composed, resolve
from stored import artifact
from words import word_tokenizer

from sddx.data import checkers, remarks
from sddx.data.check import examples_here, require_rows, require_texts, require_trainable
from sddx.data.encode import encode_all
from sddx.data.shards import read_examples
from sddx.data.sources import jsonl, texts
from sddx.data.split import hold_out
from sddx.data.tables import read_table
from sddx.data.templates import line_breaks, rewriting_prompt
from sddx.errors import UserError, mistakes_of
from sddx.files.lines import lines
from sddx.records import Example
from sddx.report.page import examples as shown_examples
from sddx.runtime import Runtime
from sddx.stages.check import precheck
from sddx.stages.held_out import require_unseen
from sddx.stages.prepare.run import prepare
from sddx.train import settings, verify

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def _remarks_anew() -> None:
    remarks.remark.cache_clear()


def written(path: Path, rows: list, **how) -> Path:
    path.write_text("".join(json.dumps(row, **how) + "\n" for row in rows), encoding="utf-8")
    return path


def responses(path: Path, response: str = "a", prompt: str = "q") -> list[str]:
    settings = {"size": None, "seed": 0, "check": checkers.none, "rewrite": "math"}
    return [each.response for each in jsonl(path=str(path), prompt=prompt, response=response, **settings).examples]


def node(path: Path, **changes) -> dict:
    return {
        "_target_": "sddx.data.sources.jsonl", "path": str(path), "prompt": "q", "response": "a", "size": None,
        "seed": 0, "check": {"_target_": "sddx.data.checkers.none", "_partial_": True}, "rewrite": "math",
        **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "trained", "remark"),
    [
        (
            ["x", float("nan"), None],
            {"x"},
            "1 of 3 rows hold NaN in column 'a'.*2 of 3 rows lack a prompt or a resp",
        ),
        ([8.0, 9.0, None], {"8", "9"}, r"column 'a' holds whole numbers as floats \(8.0\): written as 8"),
        ([8.0, 8.5], {"8.0", "8.5"}, None),
        ([2.0**60, -1.5], {str(2.0**60), "-1.5"}, None),
        ([8, True, "0.10"], {"8", "true", "0.10"}, None),
        (["x", "x", "y", "x"], {"x", "y"}, None),
    ],
)
def test_cells_are_trained_as_they_stand_or_it_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cells: list, trained: set, remark: str | None
) -> None:
    """NaN is missing as null is, whole numbers that pandas made floats of are whole again; texts, other numbers and
    words of JSON stand as they are."""
    path = written(tmp_path / "rows.jsonl", [{"q": f"what {row}?", "a": cell} for row, cell in enumerate(cells)])
    assert set(responses(path)) == trained == set(responses(path, "{a}"))
    said = "\n".join(caplog.messages)
    if remark is None:
        assert not said
    else:
        assert all(part in said.replace("\\", "") for part in remark.replace("\\", "").split(".*"))


def test_tables_of_pandas_train_the_same_from_any_file(tmp_path: Path) -> None:
    """Whole numbers with gaps, as pandas writes them into JSON lines and Parquet, are the same texts."""
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"q": ["x", "y", "z"], "a": [8, None, 10]})
    table.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    table.to_parquet(tmp_path / "rows.parquet")
    assert set(responses(tmp_path / "rows.jsonl")) == {"8", "10"} == set(responses(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    ("cell", "complaint"),
    [
        ([{"role": "user", "content": "hi"}], "rows 2, 4: a cell is a list"),
        ({"text": "hi"}, "rows 2, 4: a cell is an object"),
        (float("inf"), "rows 2, 4: inf is no text"),
        ("47. \ud83d", r"rows 2, 4: half of a surrogate pair.*47\. \\ud83d"),
    ],
)
@pytest.mark.parametrize("response", ["a", "the {a}"])
def test_what_is_no_text_is_refused_with_its_rows(tmp_path: Path, cell, complaint: str, response: str) -> None:
    """Never trained as Python writes it."""
    cells = ["x", cell, "y", cell]
    path = written(tmp_path / "rows.jsonl", [{"q": f"what {row}?", "a": each} for row, each in enumerate(cells)])
    with pytest.raises(UserError, match=complaint):
        responses(path, response)


def test_parts_of_a_conversation_can_be_named(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "seven"}]
    path = written(tmp_path / "rows.jsonl", [{"messages": turns}])
    assert responses(path, "{messages[1][content]}", "{messages[0][content]}") == ["seven"]


def test_bytes_of_a_table_are_no_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"q": ["x"], "a": [b"y"]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="row 1: a cell is bytes"):
        responses(tmp_path / "rows.parquet")


COLUMNS = [{"q": ["x", "y"], "a": ["1", "2"]}, {"q": {"0": "x", "1": "y"}, "a": {"0": "1", "1": "2"}}]


@pytest.mark.parametrize("columns", COLUMNS, ids=["lists", "pandas"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_table_of_columns_is_no_row(tmp_path: Path, columns: dict, indent: int | None) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(columns, indent=indent))
    with pytest.raises(UserError, match=r"whole columns \(q, a\).*orient"):
        read_table(tmp_path / "rows.json")


def _no_permission(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    path.write_text("{}")
    monkeypatch.setattr(Path, "read_text", refuse)


UNREADABLE: dict[str, tuple[Callable[..., object], str]] = {
    "rows.jsonl": (_no_permission, "rows.jsonl cannot be read: Permission denied"),
    "folder": (lambda path, _: path.mkdir(), "folder is a folder"),
    "link": (lambda path, _: path.symlink_to("gone"), "is a link to gone, which is not there"),
    "x" * 300: (lambda *_: None, "cannot be read: File name too long"),
    "gone.jsonl": (lambda *_: None, r"gone.jsonl is not there \(looked in"),
    "empty.jsonl": (lambda path, _: path.write_text(""), "is empty"),
    "blank.jsonl": (lambda path, _: path.write_text("\n \n"), "is empty"),
    "latin.jsonl": (lambda path, _: path.write_bytes('{"q": "é"}'.encode("latin-1")), "is not UTF-8"),
    "wide.jsonl": (lambda path, _: path.write_text('{"q": "x"}', "utf-16"), "is not UTF-8"),
    "rows.jsonl.gz": (lambda path, _: path.write_bytes(gzip.compress(b'{"q": "x"}')[:-4]), "is compressed: unpack"),
    "cut.parquet": (lambda path, _: path.write_bytes(b"PAR1 and no more"), "cannot be read as Parquet"),
    "deep.jsonl": (lambda path, _: path.write_text("[" * 100_000), "neither JSON lines nor a JSON array: row 1"),
    "long.jsonl": (lambda path, _: path.write_text("7" * 5000), "neither JSON lines nor a JSON array: row 1"),
    "cut.jsonl": (lambda path, _: path.write_text('{"q": "x"}\n{"q":\n{"q": "y"}\n{'), "array: rows 2, 4: "),
    "mixed.jsonl": (lambda path, _: path.write_text('{"q": "x"}\n3\n[4]\n'), "rows 2, 3: no object with columns"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named_with_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make, complaint = UNREADABLE[name]
    make(tmp_path / name, monkeypatch)
    texts_of = {"_target_": "sddx.data.sources.texts", "path": str(tmp_path / name), "column": "q", "size": 1}
    with pytest.raises(UserError, match=complaint) as refused:
        require_texts("calibration", {**texts_of, "seed": 0})
    if "cannot be read:" in complaint or "not there" in complaint:
        assert "Mend calibration.path" in str(refused.value)


def test_every_mistake_of_every_group_is_told_at_once_by_its_own_setting(tmp_path: Path) -> None:
    """Before any work, and each with the name that the user gives it."""
    rows = written(tmp_path / "rows.jsonl", [{"q": "x", "a": [1]}])
    wrong = [
        "calibration=texts", "calibration.path=/nope", "text=texts", f"text.path={rows}", "text.column=tekst",
        "dataset=jsonl", f"dataset.path={rows}", "dataset.prompt=w", "dataset.response=a",
    ]  # fmt: skip
    with pytest.raises(UserError) as refused, composed(*SMALL, *wrong) as cfg:
        verify(resolve(cfg))
    said = str(refused.value)
    for part in ("calibration.path", "text.column='tekst'", "dataset.prompt='w'", "row 1: a cell is a list"):
        assert part in said


WORLD = {"_target_": "sddx.tiny.data.conversations", "split": "calibration", "seed": 0}
LATE = {
    "calibration.size": (["calibration.size=1000000000"], "calibration.size=1000000000"),
    "text.size": (["text.size=1000000000"], "text.size=1000000000"),
    "dataset.size": (["dataset.size=1000000000"], "1000000008 rows"),
    "validation": (["validation=1000000000000000000000000000000"], "within 1 to 8500"),
    "skill": (["dataset.skill=ordering"], "dataset.skill='ordering'"),
    "held out": (
        ["dataset=jsonl", "dataset.path={rows}", "dataset.size=null"],
        "validation=8 of them are held out",
    ),
    "cut off": (["max_length=4"], "max_length=4"),
    "trains": (["dataset.trains=[[a]]"], r"dataset.trains=\[\['a'\]\]"),
    "no checker": (["~dataset.check._target_"], "dataset.check=.* must be a group of settings"),
    "a checker of one": (
        ["dataset.check._target_=builtins.len"],
        r"(?s)builtins.len is called with 2 values.*takes exactly one",
    ),
    "a part": (["+dataset._partial_=true"], "gives no Dataset"),
}

# What the settings show by themselves is told first, and by the rows once more.
TWICE = {"validation", "trains", "a checker of one", "a part"}


@pytest.mark.parametrize("kind", LATE)
def test_rows_are_looked_at_before_any_work(tmp_path: Path, kind: str) -> None:
    """Sizes that would never end, rows of which none is left, and what would fail in a stage."""
    given, complaint = LATE[kind]
    rows = written(tmp_path / "rows.jsonl", [{"prompt": f"what is {n}?", "response": "it"} for n in range(8)])
    with composed(*SMALL, *(each.format(rows=rows) for each in given)) as cfg:
        config = resolve(cfg)
    with pytest.raises(UserError) as first:
        verify(config)
    said = str(first.value)
    if kind in TWICE:
        with pytest.raises(UserError) as further:
            precheck(settings(config), download=False)
        said += f"\n{further.value}"
    assert re.search(complaint, said)


def repeated(path: Path, contents: int, copies: int) -> Path:
    rows = [{"q": f"what is {n}?", "a": f"it is {n}"} for n in range(contents)]
    return written(path, rows * copies)


@pytest.mark.parametrize("size", [15, 50, None])
def test_no_held_out_row_is_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int | None) -> None:
    """Where each of 30 rows stands twice, the ten that are held out are ten contents, none of which is trained, and
    that is told. What is trained is the head of what a larger size trains, and rows that repeat none keep the order
    that they have alone."""
    path, alone = repeated(tmp_path / "twice.jsonl", 30, 2), repeated(tmp_path / "once.jsonl", 30, 1)
    prepare(tmp_path, files=[], runtime=Runtime(quiet=True), dataset=node(path, size=size), validation=10)
    held_out, training = read_examples(tmp_path / "validation.jsonl"), read_examples(tmp_path / "shards")
    content = [{(row.prompt, row.response) for row in rows} for rows in (held_out, training)]
    assert len(held_out) == 10 == len(content[0]) and not content[0] & content[1]
    assert len(training) == {15: 15, 50: 40, None: 40}[size]
    assert "30 of 60 rows repeat another row" in caplog.text
    assert ("not trained on" in caplog.text) == (size != 15)
    settings = {"prompt": "q", "response": "a", "size": None, "seed": 0, "check": checkers.none, "rewrite": "math"}
    once, twice = (jsonl(path=str(each), **settings).examples for each in (alone, path))
    assert twice[:30] == once and held_out + training[:20] == once[: len(held_out + training[:20])]


def test_no_held_out_prompt_is_trained_on_with_another_answer() -> None:
    """In whatever case and white space; other prompts keep their order."""
    prompts = ["2 + 3?", "a?", "2 - 3?", "2  + 3? ", "A?"]
    examples = [Example(str(number), prompt, str(number)) for number, prompt in enumerate(prompts)]
    held_out, training = hold_out(examples, 1)
    assert [[each.id for each in rows] for rows in (held_out, training)] == [["0"], ["1", "2", "4"]]
    assert [each.id for each in hold_out(examples, 2)[1]] == ["2"]


HUB = {"_target_": "sddx.data.sources.hub", "name": "a/b", "subset": None, "split": "train", "revision": "0" * 40}


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({}, False),
        ({"size": 12, "rewrite": "code"}, False),
        ({"seed": 1}, True),
        ({"response": "b"}, True),
        ({"response": "b", "id": "q"}, True),
        ({"response": "b", "id": "n", "seed": 1}, True),
        ({"prompt": "b"}, False),
    ],
)
def test_prompts_that_are_measured_on_are_not_trained_on(tmp_path: Path, change: dict, seen: bool) -> None:
    """Whatever else two data sets differ in; the same with other answers, unless rows are held out by a name."""
    rows = [{"q": f"what is {n}?", "a": f"it is {n}", "b": f"so {n}", "n": str(n)} for n in range(40)]
    own = node(written(tmp_path / "rows.jsonl", rows))
    student = {"dataset": {**own, **change}, "validation": 8}
    assert told(lambda: require_unseen("a run", student, "drift", own, 8)) == seen
    named = {"dataset": {**own, "response": "b", "id": "n"}, "validation": 8}
    assert not told(lambda: require_unseen("a run", named, "drift", {**own, "id": "n"}, 8))


@pytest.mark.parametrize(
    ("change", "validation", "seen"),
    [
        ({}, 8, False),
        ({"size": 4, "trains": ["x"]}, 8, False),
        ({}, 4, True),
        ({"seed": 1}, 8, True),
        ({"prompt": "{q}!"}, 8, True),
        ({"split": "test", "seed": 1}, 4, False),
        ({"name": "a/c"}, 4, False),
    ],
)
def test_rows_of_the_hub_are_told_apart_by_their_settings(change: dict, validation: int, seen: bool) -> None:
    """They are not loaded before a run."""
    own = {**HUB, "prompt": "q", "response": "a", "size": None, "seed": 0, "rewrite": "math", "trains": []}
    student = {"dataset": {**own, **change}, "validation": validation}
    assert told(lambda: require_unseen("a run", student, "drift", own, 8)) == seen


def told(check: Callable[[], None]) -> bool:
    """Whether a check says that held-out prompts are trained on."""
    said = mistakes_of([check])
    assert all(each.startswith("a run trains on prompts that are held out for drift.") for each in said)
    return bool(said)


def test_nothing_is_left_where_all_rows_repeat_the_held_out_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is left to train on"):
        require_rows(node(repeated(tmp_path / "rows.jsonl", 4, 3)), validation=4)
    examples = [Example(str(number), "q", "a") for number in range(5)]
    with pytest.raises(UserError, match="none is left to train on"):
        hold_out(examples, 1)


def test_rows_that_are_too_long_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Those that lose their end, which are trained, and those that lose all, which are not."""
    tokenizer = word_tokenizer()
    rows = [Example(str(n), "a", " ".join(["b"] * n), "reference") for n in (1, 2, 30)]
    rows.append(Example("prompt", " ".join(["a"] * 40), "b", "reference"))
    longest = max(len(row.input_ids) for row in encode_all(tokenizer, rows[:2], max_length=1000)[0])
    caplog.clear()
    encoded, dropped = encode_all(tokenizer, rows, max_length=longest)
    assert ([row.id for row in encoded], dropped) == (["1", "2", "30"], 1)
    assert f"1 of 4 rows: longer than max_length={longest}" in caplog.text and "The first: 30." in caplog.text
    assert f"1 of 4 rows: dropped: max_length={longest}" in caplog.text and "The first: prompt." in caplog.text


def test_control_tokens_in_rows_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With their count: the tokenizer reads them as its own, not as the text that they are."""
    tokenizer = word_tokenizer()
    end = tokenizer.eos_token
    rows = [{"q": f"what {number} ?", "a": f"3 {end} 4" if number in (1, 4) else "3 ."} for number in range(6)]
    held_out, training = examples_here(node(written(tmp_path / "rows.jsonl", rows)), 1)
    require_trainable(tokenizer, held_out, training, max_length=64)
    assert f"2 of 6 rows hold {end}" in caplog.text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (r"Q: {q}\nA:", "Q: {q}\nA:"),
        (r"{q}\nanswer briefly\n\n{c}", "{q}\nanswer briefly\n\n{c}"),
        (r"\nabla {q} \neq \nu \not= \newline{}", r"\nabla {q} \neq \nu \not= \newline{}"),
        (r"\\n {q} \boxed{{}} \frac", r"\\n {q} \boxed{{}} \frac"),
        ("{q}\nA:", "{q}\nA:"),
    ],
)
def test_backslash_n_in_a_template_is_a_line_break(template: str, text: str) -> None:
    """As a shell leaves it; LaTeX's own commands, and what another backslash stands before, stay."""
    assert line_breaks(template) == text


def test_line_breaks_reach_prompts_and_rewriting_templates_but_no_cell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "rows.jsonl", [{"q": r"\nice", "a": "y"}])
    settings = {"response": "a", "size": None, "seed": 0, "check": checkers.none, "rewrite": "math"}
    (example,) = jsonl(path=str(path), prompt=r"Q: {q}\nA:", **settings).examples
    assert example.prompt == "Q: \\nice\nA:" and "read as a line break" in caplog.text
    assert rewriting_prompt(r"{prompt}\n{reference}", r"\nx", "y") == "\\nx\ny"


def test_rows_that_are_named_stand_in_one_order_whatever_the_answer(tmp_path: Path) -> None:
    """Two answers to the same prompts: by their names the same rows come first, by their content others."""
    rows = [{"n": f"row {n}", "q": f"q{n}", "a": f"a{n}", "b": f"b{n}"} for n in range(40)]
    path = written(tmp_path / "rows.jsonl", rows)
    settings = {"prompt": "{q}?", "size": 12, "seed": 3, "check": checkers.none, "rewrite": "math"}
    for name, same in (("n", True), ("{n}", True), (None, False)):
        by_a, by_b = (
            [each.prompt for each in jsonl(path=str(path), response=answer, id=name, **settings).examples]
            for answer in "ab"
        )
        assert (by_a == by_b) is same
    with pytest.raises(UserError, match="id='m'"):
        jsonl(path=str(path), response="a", id="m", **settings)
    twice = written(tmp_path / "twice.jsonl", [*rows, {**rows[0], "q": "other"}, {**rows[1], "n": None}])
    with pytest.raises(UserError, match="3 of 42 rows have no name of their own by .*id='n'"):
        jsonl(path=str(twice), response="a", id="n", **settings)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    """Wherever JSON lines are read, among them what the report shows of a run's self-data."""
    row = {"id": "1", "prompt": "a\u2028b", "reference": "c\u0085d\x1e", "answer": "e\u2029f", "reason": ""}
    path = written(tmp_path / "rewrites.jsonl", [row, row], ensure_ascii=False)
    assert [json.loads(line) for line in lines(path)] == [row, row]
    folder = artifact(tmp_path, "select", files={path.name: path.read_text(encoding="utf-8")})
    run = {"store": str(tmp_path), "artifacts": {"select": [folder.name]}}
    assert shown_examples([run]) == [row, row]
    assert texts(path=str(path), column="prompt", size=None, seed=0) == ["a\u2028b"] * 2


def test_remarks_are_made_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checks before a run read the rows, in their group's name, and so does the run."""
    rows = [{"q": "x", "a": None}, {"q": "y", "a": 8.0}, {"q": "y", "a": 8.0}, {"q": "z", "a": 9.0}]
    path = written(tmp_path / "rows.jsonl", rows)
    dataset = node(path, prompt=r"{q}\n:")
    require_rows(dataset, validation=1)
    told_before = list(caplog.messages)
    prepare(tmp_path, files=[], runtime=Runtime(quiet=True), dataset=dataset, validation=1)
    assert len(told_before) == len(set(told_before)) >= 4 and caplog.messages == told_before
    assert all(os.fspath(path) in message or "held-out" in message for message in told_before)
