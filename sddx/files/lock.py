"""Who builds what: a lock that ends with its holder.

On a local disk it is the operating system's, which dies with the process. On a file system of several machines,
where those cannot be relied on, it is a lease: a file that its holder touches again and again, and that others
take over when it was not touched for a while.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def hold(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock while the body runs; calls `waiting` once where another holds it. Raises UserError after
    the body where a lease was lost meanwhile: another process may have done the same work."""
    lost = Event()
    lock = _lease(path, lost) if is_shared(path) else FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()
    if lost.is_set():
        raise UserError(f"the lease {path} was lost for want of a sign of life within {LEASE:.0f} s; run it again")


def _lease(path: Path, lost: Event) -> Any:
    return SoftFileLease(path, lease_duration=LEASE, on_compromise=lambda why: lost.set())


def is_held(path: Path) -> bool:
    """Whether somebody alive holds the lock."""
    if is_shared(path):
        return path.exists() and time.time() - path.stat().st_mtime < 2 * LEASE
    if not path.exists():
        return False
    try:
        with hold(path, waiting=refuse):
            return False
    except (Held, PermissionError):  # one that is not ours to try is taken for what its holder's record says
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
    return max(above, key=lambda mount: len(mount[0]), default=("", ""))[1]
