"""Grids: checked before the first cell starts, every cell accounted for, the same command goes on."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from composing import SWEPT, composed, numbers, swept
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file
from stored import artifact

import sddx.train
from sddx.commands import sweep as look
from sddx.commands.store import main as store_command
from sddx.config import CONF, register
from sddx.errors import Interrupted, UserError
from sddx.pipeline import Method
from sddx.report.page import failed
from sddx.runtime import Runtime
from sddx.sweep import cells, launcher, loading
from sddx.sweep.engines import Job
from sddx.sweep.plan import Plan, Step, clock, describe, estimate, levels, work
from sddx.sweep.worker import perform

pytestmark = pytest.mark.runs

# For runs that build all of it, in a store of their own.
FEWER = ("dataset.size=16", "evaluation.tasks=[tiny_facts]")


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a command in an empty folder; gives the exit status and the folders of the cells of that sweep."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers])  # Hydra replaces them
    runs = iter(range(100))
    sddx.train.install()

    def command(*given: str, store: Path | None = None) -> tuple[int, list[Path]]:
        out = tmp_path / f"sweep{next(runs)}"
        where = (f"store={store or tmp_path / 'store'}", f"hydra.sweep.dir={out}", f"hydra.run.dir={out}")
        flags = [word for word in given if word.startswith("--")]
        settings = [word for word in given if not word.startswith("--")]
        monkeypatch.setattr(sys, "argv", ["sddx.train", *flags, *SWEPT, *where, *settings])
        GlobalHydra.instance().clear()
        try:
            sddx.train.main()
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        return status, sorted(path.parent for path in out.glob(f"*/{cells.RECORD}"))

    return command


@pytest.fixture(scope="module")
def store(shared_store: Path) -> Path:
    return shared_store


def test_cells_end_done_and_are_named_for_what_varies(sweep, store, capsys) -> None:
    status, folders = sweep("--multirun", "loss=sft,sdd", "seed=0,1", store=store)
    assert status == 0 and [cells.state(folder) for folder in folders] == ["done"] * 4
    assert [cells.read(folder)["name"] for folder in folders] == ["sft-s0", "sft-s1", "sdd-s0", "sdd-s1"]
    assert all((folder / "summary.json").is_file() for folder in folders)
    printed = capsys.readouterr().out
    assert "4 cells, 22 distinct stages, " in printed
    assert "4 of 4 cells are done." in printed


def test_the_same_command_again_builds_nothing_and_opens_no_run(sweep, store, monkeypatch, capsys) -> None:
    """Each cell has its summary, its table and its curves again."""
    command = ("--multirun", "seed=0,1", "wandb.mode=offline")
    _, first = sweep(*command, store=store)

    def refuse(*arguments: object) -> None:
        raise AssertionError("a stage was built again")

    monkeypatch.setattr("sddx.store._make", refuse)
    status, again = sweep(*command, store=store)
    assert status == 0 and "16 distinct stages, 16 of them in the store.\n" in capsys.readouterr().out
    for old, new in zip(first, again, strict=True):
        assert (old / "wandb").is_dir() and not (new / "wandb").exists()
        assert (new / "metrics.csv").read_text() == (old / "metrics.csv").read_text()
        assert json.loads((new / "summary.json").read_text()) == json.loads((old / "summary.json").read_text())


def test_a_cell_alone_and_inside_a_sweep_is_the_same_to_the_last_bit(sweep, store, tmp_path) -> None:
    """In a store of its own, after another cell: same weights, same scores."""
    _, folders = sweep("--multirun", "seed=3,4", *FEWER, store=store)
    status, _ = sweep("seed=4", *FEWER, store=tmp_path / "alone")
    assert status == 0
    weights = [
        load_file(next(where.glob(f"train/*/{key}/adapter_model.safetensors")))
        for where, key in ((store, trained(folders[1])), (tmp_path / "alone", trained(tmp_path / "sweep1")))
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def trained(folder: Path) -> str:
    return json.loads((folder / "summary.json").read_text())["artifacts"]["train"]


def test_a_failing_cell_leaves_its_reason_and_the_others_go_on(sweep, store, capsys) -> None:
    status, folders = sweep("--multirun", "loss=sft", "trainer.learning_rate=1e-3,1e30,2e-3", store=store)
    assert status == 1 and [cells.state(folder) for folder in folders] == ["done", "failed", "done"]
    assert "training stopped at step" in cells.read(folders[1])["reason"]
    assert "TrainingDiverged" in (folders[1] / cells.TRACEBACK).read_text()
    printed = capsys.readouterr().out
    assert "2 of 3 cells are done." in printed and "learning_rate=1e+30 failed: training stopped" in printed


def test_nothing_is_downloaded_for_one_cell_where_another_is_wrong(sweep, tmp_path, monkeypatch, capsys) -> None:
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))  # nothing was fetched
    monkeypatch.setattr("sddx.models.load.download", lambda path, revision: asked.append(path) or tmp_path)
    far = ("--multirun", "model=llama31_8b_instruct", "evaluation.chat_template=false")
    assert sweep(*far, "trainer.devices=1,2") == (2, []) and not asked
    assert "1 of 2 cells cannot run" in capsys.readouterr().err
    assert sweep(*far, "seed=0,1", "dry_run=true") == (2, []) and not asked
    assert "sddx plan with the same settings" in capsys.readouterr().err
    sweep(*far, "seed=0,1")
    assert set(asked) == {"meta-llama/Llama-3.1-8B-Instruct"}


def test_what_an_earlier_attempt_came_to_is_forgotten(tmp_path) -> None:
    chosen = SimpleNamespace(hydra=SimpleNamespace(runtime=SimpleNamespace(choices={"hydra/launcher": "basic"})))
    about = {"number": 0, "name": "a", "overrides": ["seed=0"]}
    cell = SimpleNamespace(**about, composed=chosen, config={"seed": 0}, folder=tmp_path)
    fresh = {**about, "launcher": "basic", "state": "waiting"}
    cells.write(cell.folder, state="failed", reason="boom", seconds=3.0)
    cells.prepare(cell)
    assert cells.read(cell.folder) == fresh
    with cells.running(cell.folder):
        cells.prepare(cell)  # by a second launch of the same sweep
        assert cells.state(cell.folder) == "running"


@pytest.mark.parametrize("error", [SystemExit(3), MemoryError("no room"), RuntimeError("CUDA out of memory")])
def test_whatever_a_cell_raises_ends_in_its_own_folder(sweep, error, monkeypatch) -> None:
    """SystemExit too, which would end Hydra's own sweep."""
    monkeypatch.setattr(sddx.train, "look", lambda config: SimpleNamespace(steps=[], rates=dict))
    seen = []

    def fail(store, runtime, method: Method) -> None:
        seen.append(method.seed)
        raise error

    monkeypatch.setattr(sddx.train, "Run", fail)
    monkeypatch.setattr(sddx.train, "verify", lambda config: None)
    sddx.train.launcher.install(sddx.train.verify, sddx.train.look, lambda *given: None, "sddx.train.run")
    status, folders = sweep("--multirun", "seed=0,1")
    monkeypatch.undo()
    sddx.train.install()
    assert status == 1 and seen == [0, 1]
    assert [cells.state(folder) for folder in folders] == ["failed", "failed"]
    assert cells.read(folders[0])["reason"].startswith(type(error).__name__)


def told_to_end(config: dict, folder: Path) -> None:
    """A task that SIGTERM reached in training."""
    raise Interrupted


def test_a_cell_that_was_told_to_end_is_no_failure_and_goes_on(tmp_path: Path) -> None:
    """The process ends, with the sweep in it, as its scheduler wants; the cell is taken up again."""
    (tmp_path / cells.CONFIG).write_text("seed: 0\n")
    for _ in range(2):
        with pytest.raises(Interrupted) as caught:
            perform(tmp_path, f"{__name__}.told_to_end")
        assert caught.value.code == 143 and cells.state(tmp_path) == "interrupted"
    assert not (tmp_path / cells.TRACEBACK).exists()


def test_every_mistake_of_every_cell_is_told_before_the_first_starts(sweep, capsys) -> None:
    """Once each, with the cells that make it; nothing is run."""
    status, folders = sweep("--multirun", "pruning.remove=3,40", "loss=sft,sdd", "evaluation.tasks=[tiny_fact]")
    told = capsys.readouterr().err
    assert status == 2 and not folders
    assert "4 of 4 cells cannot run" in told and "tiny_facts" in told and "Traceback" not in told


def test_what_a_sweep_owes_to_another_is_asked_for(sweep, capsys) -> None:
    """The paper's grids wait for the rates that paper_rates chooses, of both arms."""
    status, folders = sweep("--multirun", "+sweeps=paper_blocks", "rates.sft=1e-4")
    told = capsys.readouterr().err
    assert status == 2 and not folders and "Traceback" not in told
    assert "no value for trainer.learning_rate where" in told and "loss=sdd" in told


def test_only_the_cells_that_are_wrong_are_named(sweep, capsys) -> None:
    status, _ = sweep("--multirun", "pruning.remove=3,40", "loss=sft,sdd")
    told = capsys.readouterr().err
    assert status == 2 and "2 of 4 cells cannot run" in told and "40out-sft, 40out-sdd: pruning.remove=40" in told


def test_two_cells_of_one_name_are_refused(sweep, capsys) -> None:
    status, _ = sweep("--multirun", "run.name=same", "seed=0,1")
    assert status == 2 and "one name: same" in capsys.readouterr().err


def loaded(given: list[str]) -> DictConfig:
    """Hydra's configuration of one cell, as its launcher composes it."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=given, return_hydra_config=True)


def test_a_setting_that_is_none_is_refused_in_a_sweep_as_in_a_run(sweep, capsys) -> None:
    status, _ = sweep("--multirun", "trainer.nope=1,2")
    assert status == 2 and "trainer.nope is not a setting. Did you mean" in capsys.readouterr().err


CELLS = {
    "values": [["seed=0", "dataset.size=8"], ["seed=1", "dataset.size=16"]],
    "texts, nothing, lists": [["run.name='a b'", "dataset.size=null", "evaluation.tasks=[a,b]"], ["run.name=x"]],
    "options beside their values": [["pruning=last", "pruning.remove=2"], ["pruning.remove=3", "pruning=angular"]],
    "added, and changed after": [
        ["+extra.n=1", "extra.n=2"],
        ["+extra={n: 1}", "extra.n=2"],
        ["++seed=3", "seed=4"],
    ],
    "taken out": [["~dataset.size", "seed=2"], ["~dataset.size", "seed=3"]],
    "options elsewhere": [["+merging=slerp", "+merging/search=slopes", f"seed={n}"] for n in (0, 1)],
    "packages": [["+merging=slerp", "evaluation@merging.search.evaluation=selection", "merging.t=1"]],
    "of Hydra": [["hydra.job.chdir=true", "seed=0"], ["hydra.job.chdir=false", "seed=0"]],
    "resolved once": [["seed=0", "run.name=${now:%f}"], ["seed=1", "run.name=${now:%f}"]],
}


@pytest.mark.parametrize("given", CELLS.values(), ids=CELLS)
def test_a_cell_is_what_hydra_composes_of_it_alone(given: list[list[str]]) -> None:
    """Whatever stands in it and whatever came before it, with all that Hydra notes of it; or both refuse it."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra, whole = GlobalHydra.instance().config_loader(), compose("train", return_hydra_config=True)
        whole.hydra.job.config_name = "train"
        loader = loading.Loader(hydra, whole)
        for cell in [*given, *given]:
            try:
                alone = hydra.load_sweep_config(whole, cell)
            except (HydraException, OmegaConfBaseException):
                with pytest.raises(UserError):
                    loader(cell)
            else:
                found = loader(cell)
                assert OmegaConf.to_container(found) == OmegaConf.to_container(alone)
                assert OmegaConf.is_struct(found) and OmegaConf.get_cache(found) == OmegaConf.get_cache(alone)
    assert len(loader._composed) <= len(given)


def test_cells_that_differ_in_values_are_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra, whole = GlobalHydra.instance().config_loader(), compose("train", return_hydra_config=True)
        whole.hydra.job.config_name = "train"
        asked: list[list[str]] = []
        plain = hydra.load_sweep_config
        monkeypatch.setattr(hydra, "load_sweep_config", lambda *given: asked.append(given[1]) or plain(*given))
        loader = loading.Loader(hydra, whole)
        found = [loader([f"loss={loss}", f"seed={n}"]) for loss in ("sft", "sdd") for n in range(5)]
    assert asked == [["loss=sft"], ["loss=sdd"]] and [each.seed for each in found] == [*range(5), *range(5)]


RATES = ("rates.sft=1e-3", "rates.sdd=2e-3")
GIVEN = [("+sweeps=merge", "seed=3,4", "merging.method.t=0.3"), ("+sweeps=real_primary", *RATES)]


@pytest.mark.parametrize("given", GIVEN)
def test_a_value_that_names_what_varies_is_each_cells_own(given: tuple[str, ...], sweep, monkeypatch) -> None:
    """Students of the control, and rows that every seed draws for itself; rates stand for all cells."""
    taken: list[list[str]] = []
    monkeypatch.setattr(launcher.Grid, "launch", lambda self, cells, **_: taken.extend(cells))
    sweep("--multirun", *given)
    found = []
    for cell in taken:
        with composed(*cell) as cfg:
            found.append(OmegaConf.to_container(cfg, resolve=True))
    assert len({each["seed"] for each in found}) > 1
    for each in found:
        students = each["merging"]["students"] if each.get("merging") else []
        if students and students[0].startswith("seed"):
            assert students == [f"seed={each['seed']}", f"seed=1{each['seed']}"]
        elif not students:
            assert each["dataset"]["seed"] == each["seed"]
            assert each["trainer"]["learning_rate"] == {"sft": 1e-3, "sdd": 2e-3}[each["choices"]["loss"]]


def test_every_cell_has_a_folder_of_its_own_in_the_sweep(tmp_path: Path) -> None:
    """Whatever its name, which may be longer than a file's, or lead elsewhere."""
    where = (f"hydra.sweep.dir={tmp_path}", "dataset=jsonl", "dataset.prompt=a", "dataset.response=b")
    long = [(f"dataset.path={'/a' * 200}/{name}",) for name in ("one", "two")]
    away = [("dataset.path=x", f"run.name=../../{name}") for name in ("one", "two")]
    for varied in (long, away):
        found = cells.compose(loaded, [[*where, *given] for given in varied], 0)
        for cell, name in zip(found, ("one", "two"), strict=True):
            cell.folder.mkdir()  # which must not be there yet
            assert cell.name.endswith(name) and cell.folder.resolve().parent == tmp_path.resolve()
            assert len(cell.name) <= 50 and len(cell.config["wandb"]["group"]) <= 120


def test_cells_keep_the_users_own_name_and_group() -> None:
    given = ("run.name=mine-${hydra:job.num}", "wandb.group=of-${run.name}")
    found = cells.compose(loaded, [[*given, f"seed={seed}"] for seed in (0, 1)], 3)
    assert [cell.name for cell in found] == ["mine-3", "mine-4"]
    assert [cell.config["wandb"]["group"] for cell in found] == ["of-mine-3", "of-mine-4"]


@pytest.mark.parametrize("where", ["run.name", "wandb.group"])
def test_what_a_name_lacks_is_told_in_words(where: str) -> None:
    with pytest.raises(UserError, match="no.such"):
        cells.compose(loaded, [[f"{where}=${{no.such}}", f"seed={seed}"] for seed in (0, 1)], 0)


def test_cells_of_one_sweep_share_a_group_of_their_own() -> None:
    def groups(*given: str) -> set[str]:
        found = cells.compose(loaded, [[*given, f"seed={seed}"] for seed in (0, 1)], 0)
        return {cell.config["wandb"]["group"] for cell in found}

    one, other = groups(), groups("dataset.size=8")
    assert len(one) == len(other) == 1 and one != other and one == groups()
    nothing = groups("wandb.group=${oc.env:SDDX_NO_SUCH,null}")
    assert len(nothing) == 1 and all(group.startswith("seed-") for group in one | other | nothing)


def test_two_cells_in_one_folder_are_refused(sweep, capsys) -> None:
    status, folders = sweep("--multirun", "seed=0,1", "hydra.sweep.subdir=same")
    assert status == 2 and not folders and "one folder: same" in capsys.readouterr().err


def test_a_sweep_never_overwrites_what_another_found(tmp_path: Path) -> None:
    """Cells of other settings under the same names, finished or at work; the same sweep goes on."""

    def cell(**settings: object) -> SimpleNamespace:
        return SimpleNamespace(folder=tmp_path / "0-s0", config={"seed": 0, "stages": None} | settings)

    (tmp_path / "0-s0").mkdir()
    OmegaConf.save(OmegaConf.create(cell().config), tmp_path / "0-s0" / cells.CONFIG)
    cells.require_vacant([cell(loss="sdd")])  # nothing was found there yet
    with cells.running(tmp_path / "0-s0"):
        cells.require_vacant([cell()])
        with pytest.raises(UserError, match="0-s0 there are runs of other settings"):
            cells.require_vacant([cell(loss="sdd")])
    (tmp_path / "0-s0" / "summary.json").touch()
    cells.require_vacant([cell()])
    with pytest.raises(UserError, match="Give another folder with hydra.sweep.dir"):
        cells.require_vacant([cell(loss="sdd")])


DAMAGED = {
    "cut short": b'{"number": 1, "na',
    "empty": b"",
    "no text": b"\xa9\xff",
    "a list": b"[]",
    "without its number": b'{"name": "s0", "launcher": "basic", "state": "done"}',
    "a number for its reason": b'{"number": 0, "name": "s0", "launcher": "basic", "state": "failed", "reason": 3}',
    "a text for its seconds": b'{"number": 0, "name": "s0", "launcher": "basic", "state": "done", "seconds": "x"}',
    "a state that is none": b'{"number": 0, "name": "s0", "launcher": "basic", "state": "fine"}',
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_record_is_named_and_the_other_cells_are_shown(kind: str, tmp_path: Path, capsys) -> None:
    about = {"overrides": [], "launcher": "basic", "state": "done", "seconds": 75.0}
    cells.write(tmp_path / "1", number=1, name="s1", **about)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / cells.RECORD).write_bytes(DAMAGED[kind])
    assert look.main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "s1  done" in printed and "1 cells: 1 done" in printed
    assert f"left out: {tmp_path / '0' / cells.RECORD} is damaged" in printed
    assert [(name, state) for name, state, _ in failed([tmp_path])] == [("0", "unknown")]
    (tmp_path / "1" / cells.RECORD).unlink()
    assert look.main(["status", str(tmp_path)]) == 2 and "is damaged" in capsys.readouterr().err


def test_a_damaged_progress_is_none(tmp_path: Path, capsys) -> None:
    cells.write(tmp_path / "0", number=0, name="s0", overrides=[], launcher="basic", state="waiting")
    with cells.running(tmp_path / "0"):
        (tmp_path / "0" / cells.PROGRESS).write_text('{"what": "training", "done": "x"}')
        assert look.main(["status", str(tmp_path)]) == 0
    assert "so far\n" in capsys.readouterr().out


def test_watching_takes_a_time_wherever_it_stands(tmp_path: Path, capsys) -> None:
    cells.write(tmp_path / "0", number=0, name="s0", overrides=[], launcher="basic", state="done")
    assert look.main(["watch", "--every", "2", str(tmp_path)]) == 0
    for every in ("-1", "0", "nan", "inf", "x"):
        with pytest.raises(SystemExit, match="2"):
            look.main(["watch", str(tmp_path), f"--every={every}"])
        assert f"{every} is no number of seconds above 0" in capsys.readouterr().err


def test_dry_run_says_what_would_be_built_and_builds_nothing(sweep, tmp_path, capsys) -> None:
    """What cells share is counted once, and an empty store has none of it."""
    status, folders = sweep("--multirun", "loss=sft,sdd", "seed=0,1", "dry_run=true")
    printed = capsys.readouterr().out
    assert status == 0 and not folders and "4 train" in printed
    assert "4 cells, 22 distinct stages, 0 of them in the store." in printed
    assert {path.name for path in (tmp_path / "store").iterdir() if path.name[0] != "."} == {"prepare"}


def test_a_killed_cell_is_recognised_by_its_free_lock(tmp_path: Path) -> None:
    """A record that says running is believed as long as somebody holds the lock."""
    with cells.running(tmp_path):
        assert cells.read(tmp_path)["state"] == "running"
    with FileLock(tmp_path / cells.LOCK):
        assert cells.state(tmp_path) == "running"
    assert cells.state(tmp_path) == "killed"
    assert cells.state(tmp_path / "other") == "waiting"


def test_status_shows_every_cell_with_its_reason(tmp_path: Path, capsys) -> None:
    for number, (state, more) in enumerate((("done", {"seconds": 75.0}), ("failed", {"reason": "no\nmore"}))):
        cells.write(
            tmp_path / f"{number}",
            number=number,
            name=f"s{number}",
            overrides=[],
            launcher="basic",
            state=state,
            **more,
        )
    assert look.main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "75 s" in printed and printed.count("no\n") == 1 and "2 cells: 1 failed, 1 done" in printed
    assert look.main(["status", str(tmp_path / "empty")]) == 2


def test_every_cells_durations_are_looked_up(tmp_path: Path, capsys) -> None:
    """Also those of stages that the first cell does not need."""
    plans = [Plan(tmp_path), Plan(tmp_path)]
    for plan, stage in zip(plans, ("score", "distill"), strict=True):
        plan.steps.append(Step(stage, stage, False, (stage, 1)))
        artifact(tmp_path, stage)
    describe(plans)
    assert "To build: 1 score, 1 distill; about 60 s.\n" in capsys.readouterr().out


def test_durations_are_work_times_what_a_unit_took() -> None:
    steps = [SimpleNamespace(stage="train", work=("shards", 6)), SimpleNamespace(stage="score", work=("score", 1))]
    assert estimate(steps, {"shards": 2.0}) == (12.0, ["score"])
    assert (clock(40), clock(600), clock(12_000)) == ("40 s", "10 min", "3 h 20 min")


def planned(**missing: str) -> list[Plan]:
    """A plan for each, which lacks these stages (a letter each); capitals are in the store."""
    return [SimpleNamespace(steps=[Step(k, k, k.isupper(), (k, 1)) for k in keys]) for keys in missing.values()]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("plans", "expected"),
    [
        (planned(small="ax", larger="aby", largest="abcz"), [[2], [0, 1]]),
        (planned(sft="ux", sdd="usy", more="usz"), [[1], [0, 2]]),
        (planned(first="ax", second="by"), [[0, 1]]),
        (planned(first="Ax", second="Ay"), [[0, 1]]),
        (planned(one="abx", two="bcdy", three="cez"), [[1], [0, 2]]),
    ],
)
def test_no_cell_waits_for_what_another_of_its_level_builds(plans: list[Plan], expected: list[list[int]]) -> None:
    """The largest of nested sizes builds the shards of all, and what the store has binds nobody."""
    assert levels(plans) == expected
    for level in expected:
        keys = [step.key for cell in level for step in plans[cell].steps if not step.present]
        earlier = {s.key for other in expected[: expected.index(level)] for c in other for s in plans[c].steps}
        assert len(set(keys) - earlier) == len([key for key in keys if key not in earlier])


@pytest.mark.parametrize(
    ("grids", "more", "count"),
    [
        ("{loss: 'sft,sdd'},{dataset.shift: '0,1'}", (), 4),
        ("{loss: 'sft,sdd'},{dataset.shift: '0,1'}", ("loss=sft",), 3),
        ("{loss: 'sft,sdd'},{loss: 'sdd,kd'}", (), 3),
    ],
)
def test_several_grids_stand_in_one_sweep(grids: str, more: tuple[str, ...], count: int, sweep, capsys) -> None:
    """One after the other; the command line beats both; a cell that is in both runs once."""
    status, _ = sweep("--multirun", f"hydra.sweeper.grids=[{grids}]", *more, "dry_run=true")
    assert status == 0 and f"\n{count} cells, " in "\n" + capsys.readouterr().out


def test_a_cell_that_is_given_nothing_has_its_own_name(sweep, capsys) -> None:
    """Where only other cells of its grids are."""
    wrong = "{loss: sdd, pruning.remove: 40},{loss: sdd, pruning.remove: 40, selfdata.check: none}"
    status, _ = sweep("--multirun", f"hydra.sweeper.grids=[{wrong}]")
    assert status == 2 and "tiny-40out-sdd-48-s0, check=none: pruning.remove=40" in capsys.readouterr().err


def test_a_file_of_sweeps_without_multirun_is_refused(sweep, capsys) -> None:
    """Hydra would run one job and say nothing."""
    status, _ = sweep("+sweeps=depth")
    assert status == 2 and "--multirun" in capsys.readouterr().err


def test_status_shows_where_a_running_cell_is(tmp_path: Path, capsys) -> None:
    cells.write(tmp_path / "0", number=0, name="s0", overrides=[], launcher="joblib", state="waiting")
    with cells.running(tmp_path / "0"):
        cells.show(tmp_path / "0", {"what": "training", "done": 25, "total": 100, "rate": 2.5})
        assert look.main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "training 25%, 30 s left" in printed and "(joblib)" in printed


def test_a_bar_tells_where_it_is() -> None:
    told: list[dict] = []
    bar = Runtime(watch=told.append).progress(total=4, what="training", unit="step")
    bar.update(1)
    bar._told = 0.0
    bar.refresh()
    bar.close()
    assert told[-1].items() >= {"what": "training", "done": 1, "total": 4}.items()


def killed_drill(where: Path, launcher: str, stage: str) -> list[Path]:
    """A sweep of two cells of which a process is killed as soon as a cell runs and a stage has begun: the whole
    sweep where it is one process, one cell of two otherwise."""
    process, running = forked.started(forked.module, *asked(where, launcher), cwd=where), list[Path]()
    while process.is_alive() and not (running and list((where / "store" / stage).glob("*/*"))):
        time.sleep(0.02)
        records = where.glob(f"*/*/{cells.RECORD}")
        running = [path.parent for path in records if cells.state(path.parent) == "running"]
    if launcher == "basic":
        os.killpg(process.pid, signal.SIGKILL)
    elif running:
        os.kill(cells.read(running[0])["process"], signal.SIGKILL)
    process.join(120)
    return running


def asked(where: Path, launcher: str) -> list[str]:
    """What `python -m` is given for a small sweep."""
    return swept(where / str(time.time()), where / "store", f"hydra/launcher={launcher}", *FEWER)[2:]


EACH = ("distill", "train", "evaluate")
KILLS = [
    ("basic", ("train",)),
    pytest.param("basic", EACH, marks=pytest.mark.drill),
    pytest.param("joblib", EACH, marks=pytest.mark.drill),
]


@pytest.mark.parametrize(("launcher", "stages"), KILLS)
def test_a_sweep_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    launcher: str, stages: tuple[str, ...], sweep, store, tmp_path
) -> None:
    """Slow, because it takes processes that can be killed. Every killed cell is
    recognised; in the end every cell is done, nothing is damaged, and the numbers are those of no kill."""
    for stage in stages:
        for folder in killed_drill(tmp_path, launcher, stage)[:1]:
            assert cells.state(folder) == "killed"
    done = forked.command(*asked(tmp_path, launcher), cwd=tmp_path)
    assert done.returncode == 0 and "2 of 2 cells are done." in done.stdout
    assert store_command(["--store", str(tmp_path / "store"), "verify"]) == 0
    last = max((path for path in tmp_path.iterdir() if path.name[0].isdigit()), key=lambda path: float(path.name))
    _, undisturbed = sweep("--multirun", "seed=0,1", *FEWER, store=store)
    assert numbers(last) == numbers(undisturbed[0].parent) and len(numbers(last)) == 2


def preempted(config: dict, folder: Path) -> None:
    """A task that its scheduler takes back the first time, as submitit does it: checkpoint, then SystemExit."""
    if not (folder / "before").exists():
        (folder / "before").touch()
        Job(folder, "unused").checkpoint()
        raise SystemExit(-1)


def test_a_job_that_is_preempted_is_started_again_and_ends_once(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    (tmp_path / cells.CONFIG).write_text("seed: 0\n")
    cells.write(tmp_path, number=0, name="s0", overrides=[], launcher="submitit_slurm", state="waiting")
    job = Job(tmp_path, f"{__name__}.preempted")
    with pytest.raises(SystemExit):
        job()
    assert cells.state(tmp_path) == "waiting"
    job()
    assert cells.state(tmp_path) == "done"


@pytest.mark.parametrize("launcher", ["ray", "submitit_slurm"])
def test_a_cluster_that_is_not_there_is_said(launcher, sweep, store, capsys, monkeypatch) -> None:
    pytest.importorskip(launcher.split("_")[0])
    monkeypatch.setenv("PATH", "")  # no srun
    there = ["hydra.launcher.engine.address=127.0.0.1:1"] if launcher == "ray" else []
    status, _ = sweep("--multirun", "seed=0,1", f"hydra/launcher={launcher}", *there, store=store)
    told = capsys.readouterr().err
    assert status == 2 and "error: " in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("launcher", "given", "said"),
    [
        ("joblib", "jobs=0", "hydra.launcher.engine.jobs=0 must be 1 or more"),
        ("submitit_slurm", "poll=soon", "hydra.launcher.engine.poll='soon' must be a number"),
        ("ray", "gpus=two", "hydra.launcher.engine.gpus='two' must be a number"),
    ],
)
def test_a_wrong_setting_of_a_launcher_is_told_before_work(launcher, given, said, sweep, store, capsys) -> None:
    """Not when all jobs are queued."""
    asked = [f"hydra/launcher={launcher}", f"hydra.launcher.engine.{given}"]
    status, _ = sweep("--multirun", "seed=0,1", *asked, store=store)
    assert status == 2 and said in capsys.readouterr().err


def test_cells_that_differ_in_their_seeds_are_checked_once() -> None:
    """One whose seed is none is checked by itself, and every cell that makes a mistake is named."""
    checked: list[dict] = []

    def check(config: dict) -> None:
        checked.append(config)
        if config["remove"] > 3 or config["seed"] == -1:
            raise UserError(f"remove={config['remove']} with seed={'-1' if config['seed'] == -1 else 'any'}")

    grid = [(remove, seed) for remove in (3, 4) for seed in (0, 1, 2, -1)]
    made = [{"run": {"name": f"{n}"}, "seed": seed, "choices": {"seed": seed}, "remove": n} for n, seed in grid]
    several = [SimpleNamespace(config=config, name=f"{config['remove']}-{config['seed']}") for config in made]
    with pytest.raises(UserError) as told:
        launcher.check_all(several, check)
    assert [(config["remove"], config["seed"]) for config in checked] == [(3, 0), (3, -1), (4, 0), (4, -1)]
    assert "5 of 8 cells cannot run" in str(told.value)
    assert "4-0, 4-1, 4-2: remove=4 with seed=any" in str(told.value) and "3--1: remove=3" in str(told.value)


@pytest.mark.parametrize("place", ["pace", "2026-01-02/03-04-05"])
def test_the_newest_sweep_is_found_wherever_it_stands(place: str, tmp_path: Path) -> None:
    """Under a date and a time, or in a folder that was given for it."""
    with pytest.raises(UserError, match="no sweep"):
        look.newest(tmp_path)
    (tmp_path / place / "0-s0").mkdir(parents=True)
    cells.write(tmp_path / place / "0-s0", number=0, name="s0", overrides=[], launcher="basic", state="done")
    assert look.newest(tmp_path) == tmp_path / place


def test_the_work_of_steps_is_counted_by_all_their_rows() -> None:
    """However a step is accumulated."""
    steps = [{"budget": "steps", "steps": 5, "batch_size": 32 // n, "accumulate": n} for n in (1, 4)]
    assert {work("train", [], {"trainer": trainer}) for trainer in steps} == {("steps of 32", 5)}
