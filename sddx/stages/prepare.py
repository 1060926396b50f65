"""prepare: a dataset as rows on disk, in their seeded order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sddx.build import build
from sddx.data.shards import write_rows, write_shards
from sddx.records import Artifact, Dataset, UserError
from sddx.runtime import Runtime


def prepare(out: Path, *files: Artifact, runtime: Runtime, dataset: dict[str, Any], validation: int) -> None:
    """Writes `validation.jsonl`, `shards/*.jsonl` and `dataset.json` (what the examples train).

    The first `validation` rows are held out from training; `dataset.size` counts the rows after them, so that
    the rows of a smaller set are the first of a larger one. `files` are the local files that the dataset
    reads, for the key's sake. Raises UserError where the dataset does, and where no row is left to train on.
    """
    size = dataset["size"] and dataset["size"] + validation
    made: Dataset = build({**dataset, "size": size})
    held_out, training = made.examples[:validation], made.examples[validation:]
    if not training:
        raise UserError(
            f"The dataset has {len(made.examples)} rows and validation={validation} of them are held out, so "
            "none is left to train on. Lower validation, or give more rows."
        )
    write_rows(held_out, out / "validation.jsonl")
    write_shards(training, out / "shards")
    (out / "dataset.json").write_text(
        json.dumps({"trains": made.trains, "rows": len(training)}) + "\n", encoding="utf-8"
    )
    runtime.log({"prepare/rows": len(training), "prepare/held_out": len(held_out)})
