"""Where the cells of a sweep run: in this process, in processes beside it, on Slurm, on Ray.

An engine is called with the levels of a sweep and the task's path. The cells of a level may run side by side;
those of the next one need stages that these build. What became of a cell stands in its folder alone: what a
scheduler thinks of its jobs is not asked.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

from sddx.errors import UserError
from sddx.records import Count, NonNegative, Positive
from sddx.runtime import Runtime
from sddx.sweep import cells
from sddx.sweep.worker import perform

Levels = Sequence[Sequence[Path]]
Engine = Callable[[Levels, str], None]
OUTPUT = "output.txt"  # what a cell in a process of its own printed


def in_process(levels: Levels, task: str) -> None:
    """One cell after the other in this process, which pays for its imports once."""
    try:
        for number, folder in enumerate(folder for level in levels for folder in level):
            gc.collect()  # what the cell before left
            if number < 2:
                gc.freeze()  # modules, and those that a first cell needs: not searched whenever memory is freed
            perform(folder, task)
    finally:
        gc.unfreeze()
        gc.collect()


@dataclass(frozen=True, kw_only=True)
class Joblib:
    """Processes on this machine, `jobs` at a time (null: one a CUDA device, or two where there is none). Each
    cell has a process, a device and a share of the cores of its own."""

    jobs: Count | None

    def __call__(self, levels: Levels, task: str) -> None:
        from joblib import Parallel, delayed

        devices = _devices()
        jobs = self.jobs or len(devices) or 2
        free: Queue[str | None] = Queue()
        for slot in range(jobs):
            free.put(devices[slot % len(devices)] if devices else None)
        threads = max((os.cpu_count() or 1) // jobs, 1)
        with Runtime().progress(total=sum(map(len, levels)), what="cells", unit="cell") as bar:
            for level in levels:
                calls = [delayed(_apart)(folder, task, free, threads, bar.update) for folder in level]
                Parallel(n_jobs=jobs, backend="threading")(calls)


def _apart(folder: Path, task: str, free: Queue[str | None], threads: int, done: Callable[[], Any]) -> None:
    """A cell in a process of its own, on the next free device."""
    device = free.get()
    shown = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    surroundings = {"OMP_NUM_THREADS": str(threads)} | os.environ | shown
    command = [sys.executable, "-m", "sddx.sweep.worker", str(folder), task]
    try:
        with (folder / OUTPUT).open("w", encoding="utf-8") as out:
            subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=surroundings, check=False)
    finally:
        free.put(device)
        done()


def _devices() -> list[str]:
    """The CUDA devices that this process may use, without touching them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


@dataclass(frozen=True)
class Job:
    """What submitit runs; after a preemption or at its time limit the same cell is queued again, and its
    training goes on from its last checkpoint."""

    folder: Path
    task: str

    def __call__(self) -> None:
        perform(self.folder, self.task)

    def checkpoint(self) -> Any:
        """What submitit queues again where a job is preempted or out of time: the same cell, which waits once
        more."""
        from submitit.helpers import DelayedSubmission

        cells.write(self.folder, state="waiting")
        return DelayedSubmission(self)


@dataclass(frozen=True, kw_only=True)
class Submitit:
    """Jobs through submitit: `cluster` slurm, or local (processes here, as on a cluster). `parameters` are those
    of submitit's AutoExecutor, by its names; null leaves one to the cluster. Every `poll` seconds it is looked
    whether jobs have ended."""

    cluster: str
    poll: Positive
    parameters: dict[str, Any] = field(default_factory=dict)

    def __call__(self, levels: Levels, task: str) -> None:
        submitit = _engine("submitit")
        parameters = {name: value for name, value in self.parameters.items() if value is not None}
        try:
            executor = submitit.AutoExecutor(folder=levels[0][0].parent / ".submitit", cluster=self.cluster)
            executor.update_parameters(**parameters)
        # No Slurm here; a parameter that does not exist, or is of another type.
        except (RuntimeError, NameError, ValueError, AssertionError) as error:
            raise UserError(f"submitit cannot use cluster={self.cluster} with {parameters}: {error}") from None
        ordered = self.cluster == "slurm"  # it knows dependencies; elsewhere a level waits for the one before
        jobs: list[Any] = []
        with Runtime().progress(total=sum(map(len, levels)), what="cells", unit="cell") as bar:
            for level in levels:
                if ordered:
                    _follow(executor, parameters, jobs)
                with executor.batch():
                    submitted = [executor.submit(Job(folder, task)) for folder in level]
                jobs += submitted
                if not ordered:
                    _wait(submitted, self.poll, bar)
            if ordered:
                _wait(jobs, self.poll, bar)


def _follow(executor: Any, parameters: dict[str, Any], jobs: Sequence[Any]) -> None:
    """The jobs to come start when these have ended, however they ended."""
    arrays = sorted({job.job_id.split("_")[0] for job in jobs})
    more = dict(parameters.get("slurm_additional_parameters", {}))
    if arrays:
        more["dependency"] = f"afterany:{':'.join(arrays)}"
    executor.update_parameters(slurm_additional_parameters=more)


def _wait(jobs: Collection[Any], poll: float, bar: Any) -> None:
    waiting = list(jobs)
    while waiting:
        ended = [job for job in waiting if job.done()]
        bar.update(len(ended))
        waiting = [job for job in waiting if job not in ended]
        time.sleep(poll if waiting else 0)


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Tasks on a Ray cluster (`address`: auto or host:port; null starts one on this machine), each in a process
    of its own with so many `cpus` and `gpus`. Sweep folder and store must be seen by every node."""

    address: str | None
    cpus: NonNegative
    gpus: NonNegative

    def __call__(self, levels: Levels, task: str) -> None:
        ray = _engine("ray")
        quiet = {"log_to_driver": False, "configure_logging": False}
        try:
            if self.address and ":" in self.address:  # Ray itself would try for minutes
                host, _, port = self.address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(address=self.address, **quiet)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"There is no Ray cluster at {self.address} ({reason}). Start one with `ray start --head`, or give "
                "hydra.launcher.engine.address=host:port, or null for one on this machine alone."
            ) from None
        needs = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        remote = ray.remote(max_retries=0, max_calls=1, **needs)(perform)
        try:
            with Runtime().progress(total=sum(map(len, levels)), what="cells", unit="cell") as bar:
                for level in levels:
                    waiting = [remote.remote(folder, task) for folder in level]
                    while waiting:
                        _, waiting = ray.wait(waiting)
                        bar.update(1)
        finally:
            ray.shutdown()


def _engine(name: str) -> Any:
    """An optional library. Raises UserError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"This launcher needs {name}: pip install 'sddx[{name}]'.") from None
