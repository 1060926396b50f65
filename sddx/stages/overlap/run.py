"""overlap: which share of every evaluation task stands in the training rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sddx.data.overlap import WORDS, overlapping
from sddx.data.shards import read_examples
from sddx.evaluation.harness import task_texts
from sddx.evaluation.task_files import placed
from sddx.records import Artifact
from sddx.runtime import Runtime


def overlap(
    out: Path,
    *,
    data: Sequence[Artifact],
    files: Sequence[Artifact],
    runtime: Runtime,
    tasks: list[str],
    include: str | None,
    limit: int | dict[str, int] | None,
    split: dict[str, str] | None,
    **further: Any,
) -> None:
    """Writes `overlap.json`: the length of a run in `words`, and under `tasks` how many `items` are evaluated in
    each, how many are `overlapping` with a training row (see `sddx.data.overlap`), and the `share`.

    `data` has the rows of the run and of those whose students it merges. A row is its prompt and its reference
    answer; an item is its document's text as the task renders it, with its target or choices. What the model itself
    writes into self-data, and few-shot examples, are not looked at. `files` are those that tasks are read from, for
    the key's sake and for that of `data_dir`, which, as `side` and `cluster`, is among the `further` settings of
    `task_texts`.
    """
    texts = task_texts(tasks, include, limit, split, **placed(further, files))
    owners = [task for task, items in texts.items() for _ in items]
    shards = [each.path / "shards" for each in data]
    rows = (f"{example.prompt}\n{example.response}" for example in read_examples(*shards))
    hits = [owners[place] for place in overlapping(rows, [text for items in texts.values() for text in items])]
    counts = {task: {"items": len(items), "overlapping": hits.count(task)} for task, items in texts.items()}
    shares = {task: count["overlapping"] / max(count["items"], 1) for task, count in counts.items()}
    records = {task: {**count, "share": shares[task]} for task, count in counts.items()}
    (out / "overlap.json").write_text(
        json.dumps({"words": WORDS, "tasks": records}, indent=1) + "\n", encoding="utf-8"
    )
    runtime.log({f"overlap/{task}": share for task, share in shares.items()})
