"""What writing and judging with vLLM share: whether it can run here, and why it ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sddx.records import UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What vLLM is started with: `data_parallel` engines, each on `tensor_parallel` GPUs. `max_model_len` in
    tokens; None: the model's context, for which there must be memory. `python` is the interpreter that has vLLM
    (None: this one)."""

    tensor_parallel: int = 1
    data_parallel: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    python: str | None = None

    def require_packages(self, *needs: str, group: str, instead: str) -> None:
        """Raises UserError where the interpreter lacks one of the packages that it `needs`, or where there are not
        GPUs enough; with the names that the settings have in `group`, and what to use `instead`."""
        python = self.python or sys.executable
        if missing := _missing(python, needs, group):
            raise UserError(
                f"{', '.join(missing)} cannot be imported by {python}. Install the extra (pip install "
                "'sddx[vllm]', needs CUDA); or, where vLLM wants another torch, give the interpreter of an "
                f"environment that has {' and '.join(needs)} with {group}.python=/path/to/python; or use {instead}."
            )
        wanted, there = self.tensor_parallel * self.data_parallel, torch.cuda.device_count()
        if 0 < there < wanted:
            raise UserError(
                f"{group}.tensor_parallel={self.tensor_parallel} times data_parallel={self.data_parallel} "
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
