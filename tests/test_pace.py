"""Laws of how seconds become steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_report import run

from sddx.commands import pace
from sddx.errors import UserError

pytestmark = pytest.mark.fast


def timed(loss: str, seed: int, seconds: float, **fields: Any) -> dict:
    """A run of ten steps."""
    place = {"device": "cpu", "threads": 1, "training_seconds": seconds, "artifacts": {"train": f"{loss}{seed}"}}
    return run(loss, seed) | place | fields


def test_each_arm_has_the_steps_that_fill_the_seconds() -> None:
    """By the mean over its seeds, to the nearest step, of which there is one at least."""
    runs = [timed("sdd", 0, 2.0), timed("sdd", 1, 4.0), timed("on_policy", 0, 14.0)]
    steps = {each["arm"]: (each["seconds_a_step"], each["steps"]) for each in pace.paces(runs, 60)}
    assert steps == {"sdd": (pytest.approx(0.3), 200), "on_policy": (pytest.approx(1.4), 43)}
    assert {each["steps"] for each in pace.paces(runs, 0.1)} == {1}


def test_seconds_of_different_machines_are_not_held_together() -> None:
    for other in ({"threads": 4}, {"device": "NVIDIA H200"}):
        with pytest.raises(UserError, match="different places.*1 threads"):
            pace.paces([timed("sdd", 0, 2.0), timed("on_policy", 0, 14.0, **other)], 60)


def test_runs_that_trained_nothing_say_nothing() -> None:
    """Nor do those of before seconds were kept."""
    untrained = timed("none", 0, 2.0)
    untrained["scores"].pop("recovered")
    for runs in ([], [untrained], [run("sdd")]):
        with pytest.raises(UserError, match="Train each arm for a few steps"):
            pace.paces(runs, 60)


def test_what_was_timed_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(pace.page, "of_folders", lambda folders: [timed("sdd", 0, 2.0)])
    assert pace.main([str(tmp_path), "--seconds", "60", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "pace.json").read_text())
    (arm,) = found["arms"]
    assert (found["seconds"], arm["device"], arm["threads"]) == (60, "cpu", 1)
    assert found["arms"][0] | {"steps": 300, "timed_steps": 10, "runs": ["sdd0"]} == found["arms"][0]
    assert "300" in capsys.readouterr().out
    for seconds in ("0", "inf", "nan", "-1", "x"):
        with pytest.raises(SystemExit, match="2"):
            pace.main([str(tmp_path), "--seconds", seconds])


def test_a_place_that_is_not_known_is_one_of_its_own() -> None:
    """Runs that do not say where they were trained go with each other, and not with those that do."""
    unknown = [{k: v for k, v in timed("sdd", seed, 2.0).items() if k not in pace.TIMED_ON} for seed in (0, 1)]
    assert pace.paces(unknown, 60)[0]["device"] is None
    with pytest.raises(UserError, match="different places"):
        pace.paces([*unknown, timed("on_policy", 0, 2.0)], 60)
