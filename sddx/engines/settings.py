"""What writing and evaluating with vLLM share: whether it can run here, and why it ended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.version import Version

from sddx.errors import UserError
from sddx.records import Count, PositiveShare

OLDEST = "0.10"  # as in pyproject.toml
LOOK = """
import json, sys
from importlib import metadata, util
print(json.dumps({name: metadata.version(name) if util.find_spec(name) else None for name in sys.argv[1:]}))
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What vLLM is started with: `data_parallel` engines, each on `tensor_parallel` GPUs. `max_model_len` in
    tokens; None: the model's context, for which there must be memory. `python` is the interpreter that has vLLM
    (None: this one)."""

    tensor_parallel: Count = 1
    data_parallel: Count = 1
    gpu_memory_utilization: PositiveShare = 0.9
    max_model_len: Count | None = None
    python: str | None = None

    def require_packages(self, *needs: str, group: str, instead: str) -> dict[str, str | None]:
        """The versions of what the interpreter `needs`. Raises UserError where it lacks one of these packages, has
        an older vLLM than `OLDEST`, or where there are not GPUs enough; with the names that the settings have in
        `group`, and what to use `instead`."""
        python = self.python or sys.executable
        versions = _versions(python, needs, group)
        wrong = [f"cannot import {name}" for name, version in versions.items() if version is None]
        if (version := versions["vllm"]) is not None and Version(version) < Version(OLDEST):
            wrong.append(f"has vLLM {version}, and {OLDEST} or newer is needed")
        if wrong:
            raise UserError(
                f"{python} {', '.join(wrong)}. Install the extra (pip install -U 'sddx[vllm]', needs CUDA); or, "
                "where vLLM wants another torch, give the interpreter of an environment that has "
                f"{' and '.join(needs)} with {group}.python=/path/to/python; or use {instead}."
            )
        wanted, there = self.tensor_parallel * self.data_parallel, torch.cuda.device_count()
        if 0 < there < wanted:
            raise UserError(
                f"{group}.tensor_parallel={self.tensor_parallel} times data_parallel={self.data_parallel} "
                f"makes {wanted} GPUs, and there are {there}. Give less of either."
            )
        return versions


def _versions(python: str, packages: Sequence[str], group: str) -> dict[str, str | None]:
    """The version of each package in another interpreter, None where it cannot be imported there."""
    try:
        completed = subprocess.run(
            [python, "-P", "-c", LOOK, *packages], capture_output=True, timeout=60, text=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{group}.python={python} cannot be run: {error}. Give an interpreter.") from error
    return json.loads(completed.stdout) if completed.returncode == 0 else dict.fromkeys(packages)


def failed(status: int, log: str) -> UserError:
    """What to raise for a process of vLLM that ended, with the end of its log."""
    end = "\n".join(Path(log).read_text(errors="replace", encoding="utf-8").splitlines()[-8:])
    return UserError(f"vLLM ended with status {status}. The end of its log, {log}:\n{end}")
