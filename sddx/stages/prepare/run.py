"""prepare: a dataset as rows on disk, in their seeded order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sddx.config.build import build
from sddx.data.shards import write_rows, write_shards
from sddx.data.split import hold_out, with_held_out
from sddx.records import Artifact, Dataset
from sddx.runtime import Runtime


def prepare(
    out: Path, *, files: Sequence[Artifact], runtime: Runtime, dataset: dict[str, Any], validation: int
) -> None:
    """Writes `validation.jsonl`, `shards/*.jsonl` and `dataset.json` (what the examples train).

    The first `validation` rows are held out from training, with all rows that repeat their prompts; `dataset.size`
    counts the rows after them, so that the rows of a smaller set are the first of a larger one. `files` are the
    local files that the dataset reads, for the key's sake. Raises UserError where the dataset does, and where no
    row is left to train on.
    """
    made: Dataset = build(with_held_out(dataset, validation))
    held_out, training = hold_out(made.examples, validation)
    write_rows(held_out, out / "validation.jsonl")
    write_shards(training, out / "shards")
    (out / "dataset.json").write_text(
        json.dumps({"trains": made.trains, "rows": len(training)}) + "\n", encoding="utf-8"
    )
    runtime.log({"prepare/rows": len(training), "prepare/held_out": len(held_out)})
