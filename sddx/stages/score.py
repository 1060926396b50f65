"""score: how much each block, or each run of blocks, changes the hidden state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sddx.build import build
from sddx.data.encode import text_batches
from sddx.importance.score import score_blocks
from sddx.models.load import frozen_model, load_tokenizer
from sddx.records import Artifact
from sddx.runtime import Runtime

BATCH, MAX_LENGTH = 32, 2048


def score(
    out: Path,
    model: Artifact,
    *files: Artifact,
    runtime: Runtime,
    metric: dict[str, Any],
    calibration: dict[str, Any],
    dtype: str,
    attention: str,
) -> None:
    """Writes `scores.json`: the metric's mean and standard error over the calibration texts, from one pass."""
    texts = build(calibration)
    tokenizer = load_tokenizer(model.path)
    teacher = frozen_model(model.path, dtype, attention, runtime.device)
    batches = text_batches(tokenizer, texts, max_length=MAX_LENGTH, batch_size=BATCH)
    with runtime.progress(total=len(texts), what="scoring", unit="text") as bar:
        scores = score_blocks(
            teacher,
            ((batch.input_ids, batch.attention_mask) for batch in batches),
            build(metric),
            bar.update,
        )
    (out / "scores.json").write_text(json.dumps(scores) + "\n")
    runtime.log({"score/sequences": scores["sequences"]})
