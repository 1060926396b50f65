"""Processes that need not import what all of ours import: multiprocessing's own server forks them from one that has
imported that, and nothing of sddx. What they run is what a new process would run."""

from __future__ import annotations

import atexit
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

# A law of what is imported, or of what packages read from the environment when they are, takes a new process.
IMPORTED = [
    "torch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto", "peft", "lightning.pytorch", "lm_eval.evaluator", "datasets", "wandb",
    "pandas", "scipy.stats", "hydra.main",
]  # fmt: skip


def context(method: str = "forkserver") -> Any:
    """Where such processes are started; stands in for `get_context`, whatever that is asked for."""
    from torch.multiprocessing import get_context

    made = get_context("forkserver")
    made.set_forkserver_preload(IMPORTED)
    return made


def hold_much(*, runtime: Any) -> None:
    """Half a GiB, in a process that needs no model for it."""
    bytearray(2**29).find(1)


def module(name: str, *arguments: str) -> None:
    """What `python -m name arguments` does."""
    sys.argv = ["", *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run(work: Callable[..., None], given: tuple, folder: Path, env: Mapping[str, str], out: str, err: str) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    try:
        work(*given)
    finally:
        atexit._run_exitfuncs()


def started(
    work: Callable[..., None], *given: Any, cwd: Path, env: Mapping[str, str] = os.environ,
    out: str | Path = os.devnull, err: str | Path = os.devnull,
) -> BaseProcess:  # fmt: skip
    """A process that does this work, in a session, a folder and an environment of its own."""
    process: BaseProcess = context().Process(target=_run, args=(work, given, cwd, dict(env), str(out), str(err)))
    process.start()
    return process


def command(
    name: str, *arguments: str, cwd: Path, env: Mapping[str, str] = os.environ, timeout: float = 300
) -> CompletedProcess[str]:
    """Status, output and errors of `python -m name` with these arguments."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        process = started(module, name, *arguments, cwd=cwd, env=env, out=files[0], err=files[1])
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutExpired([name, *arguments], timeout)
        return CompletedProcess([name, *arguments], process.exitcode, *(file.read_text("utf-8") for file in files))
