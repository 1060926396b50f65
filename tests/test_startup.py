"""What a command does not need it does not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sddx.stages.folders import STAGES, stage

# Each takes a second and more.
WORK = ("lightning", "peft", "lm_eval", "datasets", "sklearn")
MODELS = ("transformers.modeling_utils", "transformers.models.auto.modeling_auto")
SMALL = (
    "trainer.budget=steps", "trainer.steps=1", "trainer.batch_size=2", "validation=4", "dataset.size=8", "loss=sft",
    "calibration.size=4", "text.size=4", "evaluation.tasks=[tiny_facts]", "evaluation.limit=2",
    "wandb.mode=disabled",
)  # fmt: skip
TOLD = """
import runpy, sys
arguments, sys.argv = sys.argv[1:], ["sddx.train", *sys.argv[1:]]
status = 0
try:
    runpy.run_module("sddx.train", run_name="__main__", alter_sys=True)
except SystemExit as error:
    status = error.code
print("imported", status, *sys.modules)
"""


def imported(folder: Path, *settings: str) -> tuple[str, set[str]]:
    """The status that a run in a new process ends with, and the modules that it has then."""
    given = [*SMALL, f"store={folder / 'store'}", f"hydra.run.dir={folder / 'run'}", *settings]
    done = subprocess.run([sys.executable, "-c", TOLD, *given], cwd=folder, stdout=subprocess.PIPE, text=True)
    _, status, *modules = done.stdout.splitlines()[-1].split()
    return status, set(modules)


def test_a_refusal_imports_nothing_that_works(tmp_path: Path) -> None:
    """Settings and their ranges stand apart from the work that they are for."""
    status, modules = imported(tmp_path, "trainer.steps=-1")
    assert status == "2" and not {*WORK, *MODELS, "wandb"} & modules


def test_a_finished_run_imports_nothing_that_made_it(tmp_path: Path) -> None:
    """The second time all is in the store: no model is loaded, no task read, and no logger asked for begins."""
    assert imported(tmp_path)[0] == "0"
    summary = (tmp_path / "run" / "summary.json").read_bytes()
    status, modules = imported(tmp_path)
    assert status == "0" and not {*WORK, *MODELS, "wandb"} & modules
    assert (tmp_path / "run" / "summary.json").read_bytes() == summary


@pytest.mark.fast
def test_a_stage_by_its_name_has_the_key_of_its_function() -> None:
    """What is asked of the store says nothing of whether the stage's code was imported."""
    from importlib import import_module

    from sddx.store.digest import stage_source

    for name in STAGES:
        unloaded = stage_source(stage(name))
        assert unloaded == stage_source(getattr(import_module(f"sddx.stages.{name}.run"), name))
