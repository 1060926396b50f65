"""Laws of run folders: one run at a time, one set of settings, and what is damaged is told where it is wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sddx.errors import UserError
from sddx.files.naming import MOST, file_name, shortened
from sddx.models.load import find_device
from sddx.run_folder import (
    CONFIG,
    SAMPLES,
    SUMMARY,
    Kept,
    claimed,
    read_config,
    read_samples,
    read_summary,
)
from sddx.students.recovered import find_run

pytestmark = pytest.mark.fast

CONFIGURED = {"seed": 0, "trainer": {"learning_rate": 1e-5}, "stages": None, "metrics": {"l2": {}}, "device": "cpu"}
SCORES = {"facts": 0.5, "average": 0.5}
FINISHED = {
    "name": "small", "store": "nowhere", "model_path": "nowhere", "dtype": "float32", "attention": "sdpa",
    "choices": {
        "model": "tiny", "loss": "sdd", "seed": 0, "removed": 3, "pruning": "angular", "patch": "none",
        "tuning": "lora", "dataset": "tiny_arithmetic", "size": 48, "dataset_seed": 0,
    },
    "artifacts": {"model": "a", "prune": "b", "distill": ["c", "d"]},
    "scores": {model: SCORES for model in ("unpruned", "pruned", "recovered")},
    "standard_errors": {"unpruned": SCORES}, "trained": [], "recovery": 1.0, "recovery_low": 0.9,
    "recovery_high": 1.0, "recovery_trained": None, "recovery_held_out": 1.0, "recovery_above_chance": 1.0,
    "gap_closed": None, "pruned_recovery": 0.5, "cut": [0, 1], "blocks": 3,
    "parameters": {"unpruned": 3, "pruned": 2}, "cache_bytes": {"unpruned": 3, "pruned": 2},
    "seconds": {"train": 1.5}, "peak_memory": {"train": 10}, "examples": 48, "supervised_tokens": 100, "steps": 6,
    "fallback_share": 0.1, "versions": {"torch": "2"}, "whatever": ["else"],
}  # fmt: skip
JUDGED = {"scores": [1.0, 0.0], "hashes": ["a", "b"], "settings": {}, "part_of": "facts"}


def finished(folder: Path, config: dict = CONFIGURED) -> Path:
    """The folder of a run that has ended."""
    folder.mkdir(exist_ok=True)
    (folder / SUMMARY).write_text(json.dumps(FINISHED))
    (folder / SAMPLES).write_text(json.dumps({"pruned": {"facts": JUDGED}}))
    OmegaConf.save(OmegaConf.create(config), folder / CONFIG)
    return folder


def test_two_runs_at_once_have_a_folder_each(tmp_path: Path) -> None:
    asked = tmp_path / "run"
    with claimed(asked, CONFIGURED) as first, claimed(asked, CONFIGURED) as second:
        assert (first, second) == (asked, tmp_path / "run-2")
    with claimed(asked, CONFIGURED) as again:  # the lock ends with its holder
        assert again == asked


def test_results_of_other_settings_are_never_overwritten(tmp_path: Path) -> None:
    """The same settings go on in their folder, whatever decides no number (the device) may differ."""
    asked = finished(tmp_path / "run")
    for change, name in (({}, "run"), ({"device": "cuda"}, "run"), ({"seed": 1}, "run-2")):
        with claimed(asked, CONFIGURED | change) as folder:
            assert folder.name == name
    with claimed(asked, CONFIGURED | {"stages": ["score"]}) as folder:
        assert folder.name == "run-2"
    (asked / CONFIG).write_bytes(b"\xa9\xff")  # whose results these are cannot be told
    with claimed(asked, CONFIGURED) as folder:
        assert folder.name == "run-2"


def test_what_is_logged_goes_to_the_folder_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = finished(tmp_path / "run")
    handler = logging.FileHandler(asked / "train.log", encoding="utf-8")
    monkeypatch.setattr(logging.root, "handlers", [handler])
    with claimed(asked, CONFIGURED | {"seed": 1}) as folder:
        logging.getLogger("mine").warning("here")
    handler.close()
    assert "here" in (folder / "train.log").read_text() and not (asked / "train.log").read_text()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), claimed(tmp_path / "file" / "run", CONFIGURED):
        pass


def test_what_a_run_wrote_is_read_as_it_is(tmp_path: Path) -> None:
    """Also what nobody relies on."""
    folder = finished(tmp_path)
    assert read_summary(folder / SUMMARY, Kept) == FINISHED and read_config(folder) == CONFIGURED
    assert read_samples(folder) == {"pruned": {"facts": JUDGED}}


@pytest.mark.parametrize("key", [key for key in FINISHED if key not in ("name", "whatever")])
@pytest.mark.parametrize("missing", [True, False])
def test_a_summary_without_what_is_relied_on_is_told(tmp_path: Path, key: str, missing: bool) -> None:
    """Where an entry is missing, or is of another type."""
    found = FINISHED | {key: True}
    if missing:
        del found[key]
    (tmp_path / SUMMARY).write_text(json.dumps(found))
    with pytest.raises(UserError, match=rf"summary.json is damaged, or of another version: {key}"):
        read_summary(tmp_path / SUMMARY, Kept)
    with pytest.raises(UserError, match="Give the summary.json"):
        find_run(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        ("choices", {}, "choices.model"),
        ("choices", "tiny", "choices"),
        ("dtype", "int3", "dtype"),
        ("seconds", {"train": "1"}, "seconds.train"),
        ("scores", {"unpruned": SCORES}, "scores"),
        ("scores", {"unpruned": {}, "pruned": SCORES}, "scores.unpruned"),
        ("artifacts", {"model": "a", "prune": ["b"]}, "artifacts.prune"),
        ("parameters", {"pruned": 1}, "parameters"),
    ],
)
def test_a_summary_is_looked_at_all_the_way_down(tmp_path: Path, key: str, value: object, where: str) -> None:
    (tmp_path / SUMMARY).write_text(json.dumps(FINISHED | {key: value}))
    with pytest.raises(UserError, match=f"another version: {where}: "):
        read_summary(tmp_path / SUMMARY, Kept)


@pytest.mark.parametrize(
    ("damaged", "where"),
    [
        (None, "valid dictionary"),
        ({"pruned": None}, "pruned: "),
        ({"pruned": {"facts": {}}}, "pruned.facts.scores"),
        ({"pruned": {"facts": JUDGED | {"scores": ["1", "0"]}}}, "pruned.facts.scores.0"),
        ({"pruned": {"facts": JUDGED | {"scores": [1.0]}}}, "1 scores of 2 items"),
    ],
)
def test_samples_that_are_damaged_are_told_with_the_place(tmp_path: Path, damaged: object, where: str) -> None:
    (tmp_path / SAMPLES).write_text(json.dumps(damaged))
    with pytest.raises(UserError, match=where):
        read_samples(tmp_path)


@pytest.mark.parametrize("text", [b"\xa9\xff", b"a: [", b"- 1\n", b"", None])
def test_a_configuration_that_is_none_is_told(tmp_path: Path, text: bytes | None) -> None:
    if text is not None:
        (tmp_path / CONFIG).write_bytes(text)
    if text == b"":
        assert read_config(tmp_path) == {}
        return
    with pytest.raises(UserError, match=r"config.yaml is (damaged|missing)"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "../../x", "a\nb", "x" * 300, "ä" * 200, "\ud800"])
def test_any_text_gives_the_name_of_one_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep").mkdir()
    place = tmp_path / "sweep" / file_name(text)
    place.mkdir()
    assert place.resolve().parent == tmp_path / "sweep" and len(place.name.encode()) <= MOST


def test_shortened_texts_stay_apart_and_short_ones_as_they_are() -> None:
    long = ["a" * 100 + middle + "b" * 100 for middle in "xyz"]
    assert len({shortened(text, 40) for text in long}) == 3
    assert all(shortened(text, 40).startswith("aaa") and shortened(text, 40).endswith("bbb") for text in long)
    assert shortened("3out-sdd-s0", 40) == "3out-sdd-s0"


@pytest.mark.parametrize("device", ["meta", "hpu", "vulkan", "tpu"])
def test_a_device_that_holds_no_numbers_here_is_told(device: str) -> None:
    with pytest.raises(UserError, match=f"device={device}"):
        find_device(device)
    assert find_device("cpu") == "cpu"
