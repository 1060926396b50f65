"""Laws of old names: what users' files and commands call things goes on, and means the same."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest
from composing import SMALL, composed, resolve
from forked import command

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


OLD_COMMANDS = ("sddx.plan", "sddx.store", "sddx.report", "sddx.sweep", "sddx.export", "sddx.compare")
ASKED = [[old, "--help"] for old in OLD_COMMANDS] + [
    ["sddx.commands", "--help"], ["sddx.commands", "plam"], ["sddx.commands", "store", "--help"]
]  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Status, output and errors of each of these commands."""
    folder = tmp_path_factory.mktemp("asked")
    done = {" ".join(asked): command(*asked, cwd=folder) for asked in ASKED}
    return {asked: (each.returncode, each.stdout, each.stderr) for asked, each in done.items()}


@pytest.mark.parametrize("old", OLD_COMMANDS)
def test_an_old_command_still_runs(old: str, ended: dict[str, tuple[int, str, str]]) -> None:
    status, said, wrong = ended[f"{old} --help"]
    assert status == 0 and said, wrong


def test_the_console_script_knows_its_commands(ended: dict[str, tuple[int, str, str]]) -> None:
    status, said, _ = ended["sddx.commands --help"]
    assert status == 0 and "  plan " in said
    status, _, told = ended["sddx.commands plam"]
    assert status == 2 and "Did you mean plan?" in told and "Traceback" not in told
    status, said, _ = ended["sddx.commands store --help"]
    assert status == 0 and "sddx store" in said
