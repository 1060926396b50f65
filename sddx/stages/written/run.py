"""written: what the unpruned model wrote, and how surprised it and the pruned model are by it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sddx.compression.kinds import read
from sddx.data.selfdata import CUT_OFF
from sddx.data.shards import read_rows
from sddx.data.written import measured
from sddx.drift.reading import Reading, surprise
from sddx.models.load import context_of, free_memory, frozen_model, load_tokenizer, text_config
from sddx.parallel.launch import sharded
from sddx.records import REWRITES_FILE, Artifact, Example, Rewrite
from sddx.runtime import Runtime
from sddx.students.student import load_student

SAMPLE, ROWS = 64, 8  # accepted answers that are read, drawn with a fixed seed; so many at once


def written(
    out: Path,
    *,
    base: Artifact,
    rows: Sequence[Artifact],
    runtime: Runtime,
    max_length: int,
    dtype: str,
    attention: str,
    **compressions: Artifact | None,
) -> None:
    """Writes `written.json`: what `sddx.data.written` measures of the shards of answers in `rows`, and under
    `surprise` the mean cross-entropy, in nats a token, that the unpruned and the pruned model have on references
    and on the model's own answers, over some of the accepted rows. `compressions` made the pruned model.

    Self-data distillation rests on the second being lower than the first (arXiv 2410.09982).
    """
    rewrites = read_rows(Rewrite, *(shard.path / REWRITES_FILE for shard in rows))
    accepted = [rewrite for rewrite in rewrites if not rewrite.reason]
    sample = random.Random(0).sample(accepted, min(SAMPLE, len(accepted)))
    loading = {"dtype": dtype, "attention": attention}
    losses = _surprise(base, compressions, sample, max_length, loading, runtime=runtime)
    record = {**measured(rewrites, CUT_OFF), "sample": len(sample), "surprise": losses}
    (out / "written.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@sharded
def _surprise(
    base: Artifact,
    compressions: dict[str, Artifact | None],
    sample: Sequence[Rewrite],
    max_length: int,
    loading: dict[str, str],
    *,
    runtime: Runtime,
) -> dict[str, dict[str, float | None]]:
    tokenizer, loading = load_tokenizer(base.path), {**loading, "device": runtime.device}
    texts = {
        "reference": [Example(each.id, each.prompt, each.reference, "reference") for each in sample],
        "self": [Example(each.id, each.prompt, each.answer, "self") for each in sample],
    }
    reading = Reading(tokenizer, max_length, context_of(text_config(base.path)), ROWS, runtime.device)

    def of(judged: Any) -> dict[str, float | None]:
        return {name: surprise(judged, rows, reading)["nats"] for name, rows in texts.items()}

    unpruned = of(frozen_model(base.path, **loading))
    free_memory()
    pruned = load_student(base.path, None, done=read(compressions), base=base.key, **loading)
    return {"unpruned": unpruned, "pruned": of(pruned.model)}
