"""Who builds what: a lock that ends with its holder.

On a local disk it is the operating system's, which dies with the process. On a file system of several machines,
where those cannot be relied on, it is a lease: a file that its holder touches again and again, and that others
take over when it was not touched for a while.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

from filelock import FileLock, SoftFileLease, Timeout

from sddx.errors import UserError

LEASE = 60.0  # seconds without a sign of life after which a lease may be taken over
SHARED = tuple("nfs lustre gpfs beegfs ceph cifs smb glusterfs afs fuse. pvfs panfs wekafs".split())


class Held(Exception):
    """Somebody else holds the lock."""


def refuse() -> None:
    """For `waiting`: do not wait."""
    raise Held


def repeat(message: str) -> None:
    """For `lost`: the work is to be done again."""
    raise UserError(f"{message}; run it again")


@contextmanager
def hold(
    path: Path, waiting: Callable[[], None] = lambda: None, lost: Callable[[str], None] = repeat
) -> Iterator[Callable[[], None]]:
    """Holds the lock while the body runs; calls `waiting` once where another holds it, and `lost`, with what
    happened, where a lease was lost meanwhile: another process may have done the same work. The body gets a
    function that looks for that too, for when what it made is to be shown to others."""
    compromised, shared = Event(), is_shared(path)
    lock = _lease(path, compromised) if shared else FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire(poll_interval=0.2)
    mine = _number(path)

    def check() -> None:
        # A process that slept wakes before its next sign of life tells it that another took over.
        if compromised.is_set() or (shared and _number(path) != mine):
            lost(f"the lease {path} was lost for want of a sign of life within {LEASE:.0f} s")

    try:
        yield check
        check()
    finally:
        lock.release()


def _number(path: Path) -> int | None:
    """What tells a file from one that took its name; None where there is none."""
    with suppress(FileNotFoundError):
        return path.stat().st_ino
    return None


def _lease(path: Path, lost: Event) -> Any:
    return SoftFileLease(path, lease_duration=LEASE, on_compromise=lambda why: lost.set())


def is_held(path: Path) -> bool:
    """Whether somebody alive holds the lock."""
    try:
        touched = path.stat().st_mtime
    except FileNotFoundError:  # it may be let go of at any moment
        return False
    if is_shared(path):
        return time.time() - touched < 2 * LEASE
    try:
        with hold(path, waiting=refuse):
            return False
    except (Held, OSError):  # one that is not ours to try is taken for what its holder's record says
        return True


def is_shared(path: Path) -> bool:
    """Whether this place is on a file system that several machines write to."""
    return file_system(path).startswith(SHARED)


def file_system(path: Path) -> str:
    """The type of the file system on which a path lies or would lie, as Linux names it; empty where unknown."""
    try:
        text = Path("/proc/mounts").read_text(encoding="utf-8", errors="surrogateescape")
        mounts = [line.split()[1:3] for line in text.splitlines()]
    except OSError:
        return ""
    real = os.path.realpath(path)
    above = [(place, kind) for place, kind in mounts if real == place or real.startswith(place.rstrip("/") + "/")]
    return max(reversed(above), key=lambda mount: len(mount[0]), default=("", ""))[1]  # the last one hides others
