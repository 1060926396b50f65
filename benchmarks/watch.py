"""A command in a process of its own, and when it first printed something."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

BAR = re.compile(rb"(?:scoring|distilling|training):\s+[1-9]\d*%")  # of ours, once it moved


def watched(
    command: list[str], folder: Path, pattern: re.Pattern[bytes], *, to_the_end: bool = True
) -> tuple[float, float | None, bytes]:
    """Seconds in all, seconds until what was printed had the pattern (None: it never had), and what was printed.
    Where it is not watched `to_the_end`, it is stopped there. Exits where the command fails."""
    start, first, seen = time.perf_counter(), None, b""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    while (to_the_end or first is None) and (chunk := process.stdout.read1(4096)):
        seen += chunk
        if first is None and pattern.search(seen):
            first = time.perf_counter() - start
    stopped = not to_the_end and first is not None
    if stopped:
        process.kill()
    if process.wait() and not stopped:
        sys.exit(seen.decode())
    return time.perf_counter() - start, first, seen
