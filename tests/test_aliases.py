"""Laws of old names: what users' files and commands call things goes on, and means the same."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest
from composing import SMALL, composed, resolve

from sddx.aliases import MOVED, current
from sddx.store import digest
from sddx.store.sources import name, reached

OF_SURGERY = ("branches", "choose", "fit", "junction", "patches", "remove", "soundness")
TARGETS = {
    "sddx.surgery.choose.Pruning": "sddx.compression.choose.Pruning",
    "sddx.surgery.patches.Linear": "sddx.compression.patches.Linear",
    "sddx.data.vllm.Writer": "sddx.engines.writing.Writer",
    "sddx.rehearse.small": "sddx.tiny.rehearse.small",
    "sddx.training.losses.cross_entropy": "sddx.training.losses.cross_entropy",
}


@pytest.mark.parametrize("old", [*MOVED, *(f"sddx.surgery.{name}" for name in OF_SURGERY)])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_old_module_is_the_new_one(old: str) -> None:
    if old.endswith("__main__"):
        pytest.skip("a command, below")
    new = current(old)
    assert import_module(old) is import_module(new)
    assert import_module(new).__spec__.name == new


def test_an_import_by_an_old_name_says_the_new_one() -> None:
    code = "import sddx.surgery.choose as old, sddx.compression.choose as new; assert old.Pruning is new.Pruning"
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sddx.surgery.choose is called sddx.compression.choose now." in done.stderr


@pytest.mark.parametrize("old", TARGETS)
def test_old_targets_hash_as_new_ones(old: str) -> None:
    """So that the artifacts of a user's own YAML stay where they are."""
    assert current(old) == TARGETS[old]
    assert reached(old) == reached(TARGETS[old]) and name(old) == name(TARGETS[old])


def stage(out, *, runtime, pruning):
    """Something to hash."""


def test_a_configuration_with_old_targets_has_the_same_keys_and_no_mistakes() -> None:
    from sddx.train import check_settings

    with composed(*SMALL) as cfg:
        config = resolve(cfg)
    before = digest.recipe(stage, {}, {"pruning": config["pruning"]}).key
    config["pruning"]["_target_"] = "sddx.surgery.choose.Pruning"
    config["pruning"]["choose"]["_target_"] = config["pruning"]["choose"]["_target_"].replace(
        "compression", "surgery"
    )
    check_settings(config)
    assert digest.recipe(stage, {}, {"pruning": config["pruning"]}).key == before


@pytest.mark.parametrize(
    "old", ["sddx.plan", "sddx.store", "sddx.report", "sddx.sweep", "sddx.export", "sddx.compare"]
)
def test_an_old_command_still_runs(old: str) -> None:
    done = subprocess.run([sys.executable, "-m", old, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_the_console_script_knows_its_commands() -> None:
    run = [sys.executable, "-m", "sddx.commands"]
    said = subprocess.run([*run, "--help"], capture_output=True, text=True)
    assert said.returncode == 0 and "  plan " in said.stdout
    wrong = subprocess.run([*run, "plam"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "Did you mean plan?" in wrong.stderr and "Traceback" not in wrong.stderr
    listed = subprocess.run([*run, "store", "--help"], capture_output=True, text=True)
    assert listed.returncode == 0 and "sddx store" in listed.stdout
