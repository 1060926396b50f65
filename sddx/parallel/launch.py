"""The processes of work on several devices: started for it alone, and gone when it or its like is done."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, wraps
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread, current_thread, main_thread
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

from sddx.errors import Interrupted, UserError
from sddx.runtime import Runtime
from sddx.store import measure

PATIENCE = timedelta(hours=1)  # that a process waits for the others, e.g. while one writes a checkpoint
AFTERMATH = 2.0  # seconds in which the cause of a failure may be heard of after the failure

Failure = tuple[float, BaseException]  # when it was, by a clock that all processes share


@dataclass(frozen=True)
class Place:
    """Where a process stands: its number of how many, the port where they meet, its device; and whether the
    process that started it leaves it to somebody else what SIGTERM means."""

    rank: int
    devices: int
    port: int
    device: str
    outlives: bool


def sharded(work: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates `work(*inputs, runtime=...)`, which runs passes of frozen models: where `runtime.shards` is above 1
    it is called in so many processes as `launch` calls it, between which the models are cut (`models.load.placed`).

    All of them make the same passes over the same batches in the same order, since each pass needs the shards of
    all; so they find the same, and what the first one returns is returned. They stay, with the model that they
    hold, for the next work of this kind, until `release()`.
    """

    @wraps(work)
    def run(*inputs: Any, runtime: Runtime) -> Any:
        if runtime.shards == 1:
            return work(*inputs, runtime=runtime)
        try:
            return _kept(runtime.shards, runtime.device).run(partial(run, *inputs), runtime)
        except BaseException:
            release()
            raise

    return run


_groups: dict[tuple[int, str], Group] = {}


def _kept(devices: int, device: str) -> Group:
    if (devices, device) not in _groups:
        release()
        _groups[devices, device] = Group(devices, device)
    return _groups[devices, device]


def release() -> None:
    """End the processes that wait for more, and free their devices."""
    while _groups:
        _groups.popitem()[1].end()


atexit.register(release)  # multiprocessing would wait for them


def launch(work: Callable[..., Any], devices: int, runtime: Runtime) -> Any:
    """Calls `work(runtime=...)` in so many processes, one a device, as one torch.distributed group, and returns
    what it returned in the first.

    They are started afresh and are given the work itself, which must be picklable: whatever started this
    process, a cell of a sweep included, the command line is not run again and the stages around stay in one
    process, as does the lock on what is built. The rows and the progress of the first process come back to
    `runtime`; each is given one of its own, without shards. What one of them raises ends the others and is raised
    here: a UserError or Interrupted as itself, anything else as a RuntimeError with its traceback. SIGTERM is
    passed on to all of them.
    """
    group = Group(devices, runtime.device)
    try:
        return group.run(work, runtime)
    finally:
        group.end()


class Group:
    """Processes that wait for work, one a device."""

    def __init__(self, devices: int, device: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # of what ran in this process before: they need the memory
        self._meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        outlives = callable(signal.getsignal(signal.SIGTERM))
        self._workers: dict[Connection, Any] = {}
        for number in range(devices):
            end, process = _start(Place(number, devices, self._meeting.port, _device(device, number), outlives))
            self._workers[end] = process

    def run(self, work: Callable[..., Any], runtime: Runtime) -> Any:
        """Have all of them call `work(runtime=...)`; what `launch` says of it. After an exception, `end` them."""
        with _passed_on(list(self._workers.values())):
            for end in self._workers:
                with suppress(OSError):  # one that is gone is found by listening
                    end.send((work, runtime.quiet))
            return _listen(self._workers, runtime)

    def end(self) -> None:
        """End the processes that this group started, and wait for them."""
        for process in self._workers.values():
            process.kill()
            process.join()


def _device(device: str, number: int) -> str:
    return f"cuda:{number}" if device.startswith("cuda") else device


def _start(place: Place) -> tuple[Connection, Any]:
    context = get_context("spawn")  # CUDA does not survive a fork
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(place, there), daemon=False)
    process.start()
    there.close()
    return here, process


def _listen(workers: Mapping[Connection, Any], runtime: Runtime) -> Any:
    """Hands on what the processes say until all are done, and returns what the work came to in the first. Raises
    what the first that failed did."""
    working, results = list(workers), []
    while working:
        ready: list[Any] = wait(working)
        for end in ready:
            try:
                kind, value = end.recv()
            except (EOFError, ConnectionResetError):
                raise _vanished(workers[end]) from None
            if kind == "failed":
                raise _cause(value, [other for other in working if other is not end], workers)
            if kind == "done":
                working.remove(end)
                result, peak = value
                results += result
                measure.note_peak_memory(peak)
            else:
                getattr(runtime, kind)(value)
    return results[0]


def _cause(failure: Failure, others: list[Connection], workers: Mapping[Connection, Any]) -> BaseException:
    """What ended them all. Where one process is gone the others fail in waiting for it, and that is often heard of
    first: after an error that nobody expected they are listened to for a moment."""
    failures, until = [failure], time.monotonic() + AFTERMATH
    while others and type(failures[-1][1]) is RuntimeError and (ready := _waited(others, until)):
        for end in ready:
            try:
                kind, value = end.recv()
            except (EOFError, ConnectionResetError):
                return _vanished(workers[end])
            if kind == "failed":
                failures.append(value)
            if kind in ("failed", "done"):
                others.remove(end)
    return min(failures, key=lambda each: (type(each[1]) is RuntimeError, each[0]))[1]


def _waited(ends: Sequence[Connection], until: float) -> list[Any]:
    return wait(ends, max(until - time.monotonic(), 0))


def _vanished(process: Any) -> BaseException:
    process.join()
    if process.exitcode == -signal.SIGTERM:
        return Interrupted()
    return RuntimeError(f"one of the processes ended with status {process.exitcode}, without a word")


@contextmanager
def _passed_on(processes: Sequence[Any]) -> Iterator[None]:
    """While the body runs, SIGTERM reaches the processes too, after who was told of it before."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def tell(number: int, frame: Any) -> None:
        if callable(before):
            before(number, frame)
        for process in processes:
            if process.is_alive():
                process.terminate()

    signal.signal(signal.SIGTERM, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve(place: Place, end: Connection) -> None:
    """What each of the processes runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the one that started them, which ends them
    if place.outlives:
        signal.signal(signal.SIGTERM, lambda number, frame: None)
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        _join(place)
        while True:
            work, quiet = end.recv()
            measure.reset_peak_memory(place.device)
            result = work(runtime=_runtime(place, quiet, end))
            end.send(("done", ([] if place.rank else [result], measure.peak_memory(place.device))))
    except (UserError, Interrupted) as known:
        end.send(("failed", (time.monotonic(), known)))
    except BaseException:
        message = f"in process {place.rank} of {place.devices}:\n{traceback.format_exc()}"
        end.send(("failed", (time.monotonic(), RuntimeError(message))))


def _end_with_parent() -> None:
    """Nobody would collect what an orphan finds, and the same command may be run again beside it."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _join(place: Place) -> None:
    """Make this process one of the group."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.captureWarnings(True)
    cuda = place.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(place.device)
    else:
        torch.set_num_threads(max(torch.get_num_threads() // place.devices, 1))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.TCPStore("127.0.0.1", place.port, is_master=False),
        rank=place.rank,
        world_size=place.devices,
        timeout=PATIENCE,
        device_id=torch.device(place.device) if cuda else None,
    )


def _runtime(place: Place, quiet: bool, end: Connection) -> Runtime:
    """The first process speaks for all."""
    if place.rank:
        return Runtime(device=place.device, quiet=True)
    return Runtime(
        device=place.device,
        quiet=quiet,
        log=lambda row: end.send(("log", row)),
        watch=lambda state: end.send(("watch", state)),
    )
