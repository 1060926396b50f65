"""What a manifest says about how an artifact was made: peak memory, threads, versions, commit."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

import sddx

PACKAGES = ("sddx", "torch", "transformers", "peft", "lightning", "lm_eval", "datasets")


_elsewhere: list[int] = []  # peaks of processes that worked for this one


def note_peak_memory(peak: int) -> None:
    """Counts the most bytes that another process held for this one."""
    _elsewhere.append(peak)


def reset_peak_memory(device: str) -> None:
    """Starts the count of `peak_memory` afresh where the system allows it."""
    _elsewhere.clear()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    if _uses_cuda(device):
        sys.modules["torch"].cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> int:
    """The most bytes that one process, this one or one that worked for it, held since the reset: allocated by torch
    on CUDA, else resident."""
    if _elsewhere:  # their devices did the work, and this process has what it had before
        return max(_elsewhere)
    if _uses_cuda(device):
        return sys.modules["torch"].cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # elsewhere only the highest of the whole process is known: in bytes on macOS, in KiB on other systems
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _uses_cuda(device: str) -> bool:
    torch = sys.modules.get("torch")  # never imported for this
    return device.startswith("cuda") and torch is not None and torch.cuda.is_initialized()


def threads() -> int:
    """The threads that one operation may use."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


@cache
def versions() -> dict[str, str]:
    """The version of Python and of each of PACKAGES that is installed."""
    installed = {"python": ".".join(map(str, sys.version_info[:3])), "sddx": sddx.__version__}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


@cache
def commit() -> str | None:
    """The git commit of the checkout that holds sddx, with `-dirty` where files were changed; else None."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return None
