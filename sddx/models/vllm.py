"""What writing and judging with vLLM share: whether it can run here, and why it ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sddx.records import UserError


def require_vllm(settings: Any, *, group: str, instead: str, needs: Sequence[str] = ("vllm",)) -> None:
    """Raises UserError where the interpreter of `settings` (python, tensor_parallel, data_parallel) lacks one of
    the packages that it `needs`, or where there are not GPUs enough; with the names that the settings have in
    `group`, and what to use `instead`."""
    python = settings.python or sys.executable
    if missing := _missing(python, needs, group):
        raise UserError(
            f"{', '.join(missing)} cannot be imported by {python}. Install the extra (pip install 'sddx[vllm]', "
            "needs CUDA); or, where vLLM wants another torch, give the interpreter of an environment that has "
            f"{' and '.join(needs)} with {group}.python=/path/to/python; or use {instead}."
        )
    wanted, there = settings.tensor_parallel * settings.data_parallel, torch.cuda.device_count()
    if 0 < there < wanted:
        raise UserError(
            f"{group}.tensor_parallel={settings.tensor_parallel} times data_parallel={settings.data_parallel} "
            f"makes {wanted} GPUs, and there are {there}. Give less of either."
        )


def _missing(python: str, needs: Sequence[str], group: str) -> list[str]:
    look = "import sys; from importlib.util import find_spec; print(*(n for n in sys.argv[1:] if not find_spec(n)))"
    try:
        told = subprocess.run([python, "-P", "-c", look, *needs], capture_output=True, timeout=60, text=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{group}.python={python} cannot be run: {error}. Give an interpreter.") from error
    return told.stdout.split() if told.returncode == 0 else list(needs)


def failed(status: int, log: str) -> UserError:
    """What to raise for a process of vLLM that ended, with the end of its log."""
    end = "\n".join(Path(log).read_text(errors="replace").splitlines()[-8:])
    return UserError(f"vLLM ended with status {status}. The end of its log, {log}:\n{end}")
