"""What a process held at most, of its own: `ru_maxrss` of a child begins with what its parent held."""

from __future__ import annotations

from pathlib import Path


def peak() -> float:
    """The most memory that this process ever held, mapped files among it, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
