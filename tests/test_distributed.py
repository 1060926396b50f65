"""Laws of training in several processes: the numbers of one, resuming, one writer, an end without orphans."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from families import build
from test_training import CUT, EVERYTHING, Killed, Log, examples, pruned, weights
from torch.distributed.tensor import DTensor

from sddx.errors import Interrupted, UserError
from sddx.models.anatomy import blocks
from sddx.parallel import distributed
from sddx.parallel.distributed import shard
from sddx.parallel.launch import launch
from sddx.runtime import Runtime
from sddx.store import measure
from sddx.students.teacher import SeparateTeacher
from sddx.training.fit import Fit
from sddx.training.module import Distiller
from sddx.training.tuning import full, lora

pytestmark = pytest.mark.usefixtures("quick_groups")

Found = tuple[dict, dict, list[dict]]  # the trained weights, what fit said, and the rows
ADAPTER = partial(lora, rank=2, alpha=4, dropout=0.2)
TUNINGS = {"lora": ADAPTER, "full": full}
# 22 examples in steps of 8: the last of each epoch has three micro-batches for two processes.
SETTINGS = {"batch_size": 2, "accumulate": 4, "log_every": 1, "epochs": 2, "validate_every": 2, "keep": "best"}


def train(out: Path, tune: Any, objective: Any, separate: bool, *, runtime: Runtime, **settings: Any) -> None:
    """What each process runs; the first writes the trained weights and what fit said."""
    runtime_log = runtime.log
    if os.environ.get("SLOW"):
        runtime = replace(runtime, log=lambda row: (runtime_log(row), time.sleep(0.2)))
    student, teacher = pruned(tune, torch.float64)
    if separate:
        teacher = SeparateTeacher(build("llama", blocks=4).double())
    fit = Fit(**SETTINGS | settings)
    report = fit(student, teacher if objective.needs_teacher else None, objective, CUT, examples(22),
                 examples(5, seed=1), 1, 0, out, runtime)  # fmt: skip
    if distributed.rank() == 0:
        torch.save(weights(student), out / "weights.pt")
        (out / "report.json").write_text(json.dumps(report))


def trained(out: Path, strategy: str, *, tune: Any = ADAPTER, objective: Any = EVERYTHING, separate: bool = False,
            kill_at: int | None = None, signal_at: int | None = None, **settings: Any) -> Found:  # fmt: skip
    """The weights, the report and the rows of a training under a strategy, with two processes for most."""
    out.mkdir(exist_ok=True)
    log = Log(out, kill_at)

    def logged(row: dict) -> None:
        log(row)
        if row["step"] == signal_at:
            signal.raise_signal(signal.SIGTERM)

    work = partial(train, out, tune, objective, separate, strategy=strategy, **settings)
    if strategy == "single":
        work(runtime=Runtime(quiet=True, log=logged))
    else:
        launch(partial(work, devices=2), 2, Runtime(quiet=True, log=logged))
    report = json.loads((out / "report.json").read_text())
    return torch.load(out / "weights.pt"), report, log.rows()


def same_rows(ours: list[dict], theirs: list[dict]) -> None:
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-8, abs=1e-10)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, Found]:
    """What one process finds, with an adapter and its shared teacher, or with all weights and a separate one."""
    return {name: trained(tmp_path_factory.mktemp(name), "single", tune=tune) for name, tune in TUNINGS.items()}


def same(found: Found, expected: Found) -> None:
    """Weights, rows (losses, gradient norm, held-out loss) and report are equal but for rounding (float64)."""
    (ours, our_report, our_rows), (theirs, their_report, their_rows) = found, expected
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    assert len(our_rows) == len(their_rows)
    for a, b in zip(our_rows, their_rows, strict=True):
        assert a == pytest.approx(b, rel=1e-8, abs=1e-10)
    assert our_report["validation"] == pytest.approx(their_report["validation"], rel=1e-8)
    for name in ("steps", "examples", "supervised_tokens", "kept_step"):
        assert our_report[name] == their_report[name]


@pytest.mark.parametrize(("strategy", "name"), [("ddp", "lora"), ("fsdp", "lora"), ("fsdp", "full")])
def test_two_processes_find_what_one_finds_even_after_a_crash(tmp_path, one, strategy, name):
    """With every kind of term, dropout, steps that do not divide by two, and blocks computed again. Killed in the
    fifth step, with checkpoints at the second and fourth, the same call goes on; only one process wrote."""
    tune, expected = TUNINGS[name], one[name]
    settings = {"tune": tune, "checkpoint_every": 2, "gradient_checkpointing": name == "full"}
    with pytest.raises(Killed):
        trained(tmp_path, strategy, kill_at=5, **settings)
    saved = torch.load(tmp_path / "resume" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert {type(value) for value in saved["state_dict"].values()} == {torch.Tensor}
    copied = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-alone"))
    same(trained(tmp_path, strategy, **settings), expected)
    same(trained(copied, "single", **settings), expected)


def test_the_peak_of_memory_is_that_of_the_processes_that_work(monkeypatch):
    """They hold what the one that waits for them does not. Here they start as they do for a user."""
    monkeypatch.setattr("sddx.parallel.launch.get_context", torch.multiprocessing.get_context)
    measure.reset_peak_memory("cpu")
    launch(forked.hold_much, 2, Runtime(quiet=True))
    assert 2**29 < measure.peak_memory("cpu") < 2**31
    measure.reset_peak_memory("cpu")
    assert not measure._elsewhere


def hold_half(*, runtime: Runtime) -> None:
    """Raises where a process holds more than its half of a student's or a shared teacher's weights."""
    student, teacher = pruned(ADAPTER)
    module = Distiller(student, teacher, EVERYTHING, CUT, 0, steps_total=1, learning_rate=1e-3)
    sizes = {name: weight.numel() for name, weight in module.named_parameters()}
    shard(module, [*blocks(student), *teacher.blocks], torch.device("cpu"))
    removed = set(teacher.blocks.parameters()) - set(student.parameters())
    assert removed and all(isinstance(weight, DTensor) for weight in removed)
    held = {name: weight.to_local().numel() for name, weight in module.named_parameters()}
    assert held.keys() == sizes.keys() and all(2 * held[name] == size for name, size in sizes.items())


def test_of_two_processes_each_holds_half_of_every_weight():
    """Of what is frozen, of the adapter, and of the removed blocks that only the teacher runs."""
    launch(hold_half, 2, Runtime(quiet=True))


def test_what_each_process_takes(monkeypatch):
    """Every part once, as many passes everywhere, and weight 0 for what stands in for none."""
    monkeypatch.setattr(distributed, "world", lambda: 3)
    shares = []
    for number in range(3):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        shares.append(distributed.share("abcde"))
    assert shares == [
        [(0, "a", 1.0), (3, "d", 1.0)],
        [(1, "b", 1.0), (4, "e", 1.0)],
        [(2, "c", 1.0), (0, "a", 0.0)],
    ]


def fail(error: BaseException | signal.Signals | None, *, runtime: Runtime) -> None:
    """One process fails, or vanishes, while the other waits for it."""
    if distributed.rank() == 1:
        if error is None:
            os._exit(3)
        if isinstance(error, signal.Signals):
            signal.raise_signal(error)
        raise error
    distributed.barrier()


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [(UserError("no such row"), UserError, "^no such row$"), (KeyError("x"), RuntimeError, "(?s)1 of 2.*KeyError"),
     (None, RuntimeError, "status 3"), (signal.SIGTERM, Interrupted, "143")],
)  # fmt: skip
def test_one_that_fails_ends_all(error, raised, message):
    """At once; a user's mistake stays one, and so does being told to end, where nothing is saved for that."""
    start = time.monotonic()
    with pytest.raises(raised, match=message):
        launch(partial(fail, error), 2, Runtime(quiet=True))
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("strategy", "devices", "accumulate", "message"),
    [("single", 2, 4, "strategy=ddp"), ("ddp", 4, 2, "accumulate")],
)
def test_devices_that_cannot_share_are_refused(strategy, devices, accumulate, message):
    with pytest.raises(UserError, match=message):
        Fit(strategy=strategy, devices=devices, accumulate=accumulate)


def slow(out: Path, strategy: str) -> None:
    """A training that can be met in the middle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sddx.parallel.launch.get_context", forked.context)
        trained(out, strategy)


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_told_to_end_it_saves_and_the_same_command_goes_on(tmp_path, one, strategy):
    """SIGTERM in mid-training: the step is finished and saved, the status is 143, and what the same command finds
    afterwards is what an undisturbed one finds."""
    said, rows = tmp_path / "said", tmp_path / "metrics.jsonl"
    process = forked.started(slow, tmp_path, strategy, cwd=tmp_path, env=os.environ | {"SLOW": "1"}, err=said)
    while process.is_alive() and not (rows.exists() and rows.stat().st_size):
        time.sleep(0.02)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143 and "the same command goes on" in said.read_text()
    step = torch.load(tmp_path / "resume" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 6 and not (tmp_path / "report.json").exists()
    same(trained(tmp_path, strategy), one["lora"])


def test_who_handled_the_signal_before_decides(tmp_path, one):
    """As submitit does, which queues the job again on another signal: the training is saved and goes on."""
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with pytest.raises(Killed):
            trained(tmp_path, "single", kill_at=4, signal_at=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert set(told) == {signal.SIGTERM}
    assert torch.load(tmp_path / "resume" / "last.ckpt", weights_only=True)["global_step"] == 2
    same(trained(tmp_path, "single"), one["lora"])
