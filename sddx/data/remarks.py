"""What is said about rows: each setting by the group that it stands in, and each remark once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

_log = logging.getLogger(__name__)
_group: ContextVar[str] = ContextVar("group", default="")
FIRST = 5


@contextmanager
def of_group(name: str) -> Iterator[None]:
    """Within it, mistakes name settings of this group: `calibration.path`."""
    token = _group.set(name)
    try:
        yield
    finally:
        _group.reset(token)


def setting(name: str) -> str:
    """A setting's name as the user gives it, where the group is known."""
    return f"{_group.get()}.{name}" if _group.get() else name


@cache  # rows are read by the checks before a run and by the run
def remark(text: str) -> None:
    """Tell the user something that is no mistake; once a process."""
    _log.warning("%s", text)


def numbered(rows: Sequence[int]) -> str:
    """`row 3`, or `rows 3, 5, 6, 8, 9 and 12 more`."""
    first = ", ".join(map(str, rows[:FIRST]))
    more = f" and {len(rows) - FIRST} more" if len(rows) > FIRST else ""
    return f"row{'s' if len(rows) > 1 else ''} {first}{more}"
