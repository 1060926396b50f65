"""Laws of the comparison of two runs, and of the tables that report a run."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from rich.console import Console
from scipy import stats

from sddx.commands import compare
from sddx.errors import UserError
from sddx.records import ROLES, Rewrite
from sddx.report import table

pytestmark = pytest.mark.fast

SETTINGS = {"version": 1.0, "shots": 0, "chat_template": "abcd", "filters": [{"name": "strict"}]}


def task(scores: list[float], **settings: object) -> dict:
    return {
        "scores": scores,
        "hashes": [f"item {index}" for index in range(len(scores))],
        "settings": SETTINGS | settings,
        "chance": 0.0,
        "part_of": "",
    }


@pytest.fixture
def samples() -> dict:
    found = {"sums": task([1, 0, 0, 0, 0, 0, 1, 1]), "facts": task([1, 1, 0, 0])}
    return {name: record | {"part_of": name} for name, record in found.items()}


def test_paired_differences_by_hand(samples: dict) -> None:
    """B - A per task and on average, flips and exact p as counted by hand; Holm over the two tasks."""
    other = copy.deepcopy(samples)
    other["sums"]["scores"] = [0, 1, 1, 1, 1, 1, 1, 1]
    found = compare.compare(samples, other)
    sums, facts = found["tasks"]["sums"], found["tasks"]["facts"]
    assert sums["difference"].estimate == pytest.approx(4 / 8) and sums["flipped"] == (1, 5)
    assert sums["p"] == pytest.approx(stats.binomtest(1, 6).pvalue)
    assert sums["p_holm"] == pytest.approx(2 * sums["p"]) and facts["p_holm"] == 1.0
    assert found["average"].estimate == pytest.approx(0.25) and found["average"].contains == "items"
    assert found["average"].low <= 0.25 <= found["average"].high


def test_scores_that_are_not_binary_are_compared_without_mcnemar(samples: dict) -> None:
    """A graded score has a paired difference, and no flips and no p."""
    samples["facts"]["scores"] = [0.5, 1, 0, 0]
    facts = compare.compare(samples, samples)["tasks"]["facts"]
    assert facts["p"] is None and facts["flipped"] is None and facts["difference"].estimate == 0


def test_clusters_measures_and_what_stands_apart(samples: dict) -> None:
    """Items of a cluster have no exact test; what stands apart is in no average; a measure that both runs have is
    compared as scores are."""
    samples["facts"] |= {"clusters": ["a", "a", "b", "b"], "apart": True}
    samples["sums"]["bits_per_byte"] = [1.0] * 8
    other = copy.deepcopy(samples)
    other["sums"]["scores"], other["facts"]["scores"] = [1, 1, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0]
    other["sums"]["bits_per_byte"] = [0.5, 1.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    found = compare.compare(samples, other)
    assert found["average"].estimate == pytest.approx(1 / 8)
    facts = found["tasks"]["facts"]
    assert facts["p"] is None and facts["flipped"] == (2, 0) and facts["difference"].low == -1
    assert found["measures"].keys() == {"bits_per_byte"}
    bits = found["measures"]["bits_per_byte"]
    assert bits.keys() == {"sums", "average"} and bits["sums"].estimate == pytest.approx(-3 / 8)
    console = Console(record=True, width=120)
    compare.show(found, {}, console)
    assert "B - A, bits per byte" in console.export_text()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda s: s["sums"]["hashes"].reverse(), "sums: the items differ"),
        (lambda s: s["sums"].update(task([1, 0])), "8 and 2, 2 in common"),
        (lambda s: s["facts"]["settings"].update(chat_template=None), "chat_template is abcd and None"),
        (lambda s: s["facts"]["settings"].update(version=2.0), "facts: version is 1.0 and 2.0"),
        (lambda s: s["facts"]["settings"].update(shots=5), "facts: shots is 0 and 5"),
        (lambda s: s.pop("facts"), "facts is in one of the two only"),
    ],
)
def test_refused_where_items_or_settings_differ(samples: dict, change, reason: str) -> None:
    """What was not measured alike is not compared, and the reason is named."""
    other = copy.deepcopy(samples)
    change(other)
    with pytest.raises(UserError, match=reason):
        compare.compare(samples, other)


def written(folder: Path, samples: dict, configuration: str) -> Path:
    folder.mkdir()
    (folder / "samples.json").write_text(json.dumps({"unpruned": samples, "recovered": samples}))
    (folder / "summary.json").write_text("{}")
    (folder / "config.yaml").write_text(configuration)
    return folder


def test_command_line(tmp_path: Path, samples: dict, capsys: pytest.CaptureFixture) -> None:
    """Folders and summary files are taken alike; the configuration's differences are named, flat."""
    first = written(tmp_path / "a", samples, "seed: 0\ntuning: {rank: 8}\n")
    second = written(tmp_path / "b", samples, "seed: 0\ntuning: {rank: 16}\n")
    assert compare.main([str(first), str(second / "summary.json")]) == 0
    printed = capsys.readouterr().out
    assert "tuning.rank" in printed and "seed" not in printed and "+0.0" in printed
    assert compare.main([str(first), str(second), "--model", "pruned"]) == 2
    assert "it has unpruned, recovered" in capsys.readouterr().err
    assert compare.main([str(first), str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_a_damaged_file_is_told_by_its_name(tmp_path: Path, samples: dict, capsys: pytest.CaptureFixture) -> None:
    first = written(tmp_path / "a", samples, "seed: 0\n")
    for name, text in (("config.yaml", "a: ["), ("samples.json", "null")):
        second = written(tmp_path / name, samples, "seed: 0\n")
        (second / name).write_text(text)
        for given in ([first, second], [second, first]):
            assert compare.main(list(map(str, given))) == 2
            assert f"{second / name} is damaged" in capsys.readouterr().err


def test_help_is_printed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        compare.main(["--help"])
    assert left.value.code == 0 and "summary.json" in capsys.readouterr().out


SUMMARY = {
    "scores": {
        "unpruned": {"sums": 0.9, "facts": 0.8, "average": 0.85},
        "pruned": {"sums": 0.1, "facts": 0.7, "average": 0.4},
        "recovered": {"sums": 0.81, "facts": 0.72, "average": 0.765},
    },
    "standard_errors": {m: {"sums": 0.01, "facts": 0.02, "average": 0.015} for m in ROLES},
    "recovery": 0.9, "recovery_low": 0.88, "recovery_high": 0.93, "recovery_contains": "items",
    "pruned_recovery": 0.4706, "recovery_trained": 0.9, "recovery_held_out": None, "gap_closed": 0.811,
    "trained": ["sums"], "fallback_share": 0.125, "examples": 1500, "supervised_tokens": 64000, "steps": 282,
    "seconds": {"score": 1.24, "train": 30.4}, "parameters": {"unpruned": 2000000, "recovered": 1600000},
}  # fmt: skip

EXPECTED = [
    "90.0 ± 1.0", "72.0 ± 2.0", "81.0 ± 1.0", "76.5 ± 1.5", "88.0 to 93.0", "over items", "47.1 %", "81.1 %",
    "12.5 %", "1,500 examples", "64,000 supervised tokens", "282 steps", "30 s", "1,600,000",
]  # fmt: skip


def test_table_says_what_the_summary_says() -> None:
    """Every score, recovery and cost of the summary stands in the terminal table and in the Markdown."""
    console = Console(width=140, record=True, file=open("/dev/null", "w"))
    table.show(SUMMARY, console)
    for text in (console.export_text(), table.markdown(SUMMARY)):
        for expected in EXPECTED:
            assert expected in text
        assert "held-out" not in text  # not defined here, so not claimed


def test_markdown_table_is_rectangular() -> None:
    """Every row of the Markdown table has as many cells as its header."""
    cells = [line.count(" | ") for line in table.markdown(SUMMARY).splitlines() if line.startswith("| ")]
    assert len(cells) == 4 and set(cells) == {len(table.header(SUMMARY)) - 1}


def test_table_without_a_recovered_model() -> None:
    """A run that only pruned says what was kept, and speaks of neither recovery nor training."""
    scores = {model: SUMMARY["scores"][model] for model in ("unpruned", "pruned")}
    summary = SUMMARY | {"scores": scores, "recovery": None, "steps": 0}
    assert table.header(summary)[-2:] == ("pruned", "kept")
    assert table.rows(summary)[0][-2:] == ("10.0 ± 1.0", "11.1 %")
    assert not {"recovery", "training"} & set(dict(table.lines(summary)))


FILTERS = {
    "part_of": {"one": "sums", "two": "sums", "facts": "facts"},
    "primary": {"one": "match,flexible", "two": "match,flexible", "facts": "acc,none"},
    "metrics": {
        model: {
            "one": {"match,flexible": 0.5, "match,strict": strict},
            "two": {"match,flexible": 0.7, "match,strict": strict - 0.2},
            "facts": {"acc,none": 0.8, "acc_norm,none": 0.9},
        }
        for model, strict in (("unpruned", 0.6), ("pruned", 0.3))
    },
    "unparsed": {
        "unpruned": {"one": {"strict": 0.1}, "two": {"strict": 0.2}},
        "pruned": {"one": {"strict": 0.5}, "two": {"strict": 0.5}},
    },
}  # fmt: skip


def test_every_reading_of_an_answer_is_shown() -> None:
    """Parts count equally, the reported one is marked; two metrics under one filter are no two readings."""
    shown = {label: text for label, text in table.lines(SUMMARY | FILTERS) if "match," in label or "acc" in label}
    assert shown == {
        "sums, match,flexible (primary)": "unpruned 60.0 %, pruned 60.0 %",
        "sums, match,strict": "unpruned 50.0 % (15.0 % unparsed), pruned 20.0 % (50.0 % unparsed)",
    }


@pytest.mark.parametrize(("share", "shown"), [(0.0, False), (0.25, True)])
def test_one_filter_is_shown_where_it_left_answers_unread(share: float, shown: bool) -> None:
    """Of all models, if of any."""
    found = {
        "part_of": {"sums": "sums"},
        "metrics": {model: {"sums": {"match,only": 0.5}} for model in ("unpruned", "pruned")},
        "unparsed": {"unpruned": {"sums": {"only": 0.0}}, "pruned": {"sums": {"only": share}}},
    }
    told = "unpruned 50.0 % (0.0 % unparsed), pruned 50.0 % (25.0 % unparsed)"
    assert dict(table.lines(SUMMARY | found)).get("sums, match,only") == (told if shown else None)


def test_acceptance_counts_reasons_and_shows_examples() -> None:
    """Accepted are the self-written answers; refused ones are counted by their reason."""
    rewrites = [
        Rewrite("1", "what is [2 + 2]", "4", "it is 4"),
        Rewrite("2", "what is 3 + 3", "6", "it is 6"),
        Rewrite("3", "what is 4 + 4", "8", "it is 9", "wrong answer [/b]"),
    ]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    table.acceptance(rewrites, console, shown=1)
    text = console.export_text()
    assert "66.7 %" in text and "refused: wrong answer [/b]" in text
    assert "what is [2 + 2]" in text and "it is 4" in text and "3 + 3" not in text
