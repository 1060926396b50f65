"""Which items of a task are evaluated: on which side they are, and which a limit draws."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from sddx.errors import UserError
from sddx.evaluation.seeds import SEEDS
from sddx.evaluation.tasks import of_task, said, text_of

# Of nine items, on average, so many are for the report and so many for choosing anything.
SIDES = {"report": 7, "selection": 2}


def draw(
    tasks: Mapping[str, Any],
    part_of: Mapping[str, str],
    limit: int | Mapping[str, int] | None,
    side: str | None = None,
) -> dict[str, list[int]] | None:
    """Items by task, ascending as lm-eval needs them; None for all. A smaller limit draws a part of what a larger
    one does, and which items these are hangs on the task's name and size alone; with a `side` (`SIDES`), also on
    which of the items are on it.

    A limit is that of an asked-for task, and is shared out among its parts. Raises UserError for a task that has no
    item on the side.
    """
    if limit is None and side is None:
        return None
    drawn: dict[str, list[int]] = {}
    for asked in dict.fromkeys(part_of.values()):
        candidates = {name: _candidates(name, task, side) for name, task in tasks.items() if part_of[name] == asked}
        wanted, sizes = of_task(limit, asked), {name: len(items) for name, items in candidates.items()}
        shares = sizes if wanted is None else shared_out(wanted, sizes)
        drawn |= {name: _sample(name, candidates[name], share) for name, share in shares.items()}
    return drawn


def _candidates(name: str, task: Any, side: str | None) -> Sequence[int]:
    if side is None:
        return range(len(task.eval_docs))
    sides = [side_of(name, own(task, document)) for document in task.eval_docs]
    if side not in sides:
        raise UserError(f"No item of the task {name!r} is on the side side={side}; it has {len(sides)} in all.")
    return [item for item, each in enumerate(sides) if each == side]


def own(task: Any, document: Any) -> str:
    """What tells an item from others: its text or, where items share a passage, that, so that none on one side has
    its passage on the other."""
    return cluster_of(task, document) or text_of(task, document)


def cluster_of(task: Any, document: Any) -> str | None:
    """What an item shares with others that are no draws of their own: what it has in the column, or makes of the
    template of columns, that the task's metadata or `evaluation.cluster` names. None where these name none, and
    where an item has nothing there and is a draw by itself."""
    column = said(task).get("cluster")
    value = None if column is None else task.resolve_field(document, column)
    return None if value is None or value == "" else str(value)


def side_of(name: str, item: str) -> str:
    """On which side a task's item is: by a digest of its own text, so that no other item, no order and no further
    column moves it."""
    place = int.from_bytes(_rank(name, item))
    return "report" if place % sum(SIDES.values()) < SIDES["report"] else "selection"


def shared_out(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many items of each part: equal numbers, because parts count equally in their task's score. It is unbiased
    with any numbers, and surest with equal ones where parts vary alike. What a small part lacks, larger ones give;
    at least one of each."""
    shares: dict[str, int] = {}
    for size, name in sorted((size, name) for name, size in sizes.items()):
        still = (total - sum(shares.values())) // (len(sizes) - len(shares))
        shares[name] = min(size, max(1, still))
    return shares


def _sample(name: str, items: Sequence[int], count: int) -> list[int]:
    """The first items in an order that a digest gives, not those of the file: files are often sorted."""
    return sorted(sorted(items, key=lambda item: _rank(name, item))[:count])


def _rank(name: str, item: int | str) -> bytes:
    return hashlib.sha256(f"{SEEDS['items']}/{name}/{item}".encode()).digest()
