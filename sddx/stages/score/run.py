"""score: how much each unit of a model matters, by one metric or by several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sddx.config.build import build
from sddx.data.encode import text_batches
from sddx.evaluation.task_files import placed
from sddx.importance.score import Subject, score_units
from sddx.models.anatomy import blocks
from sddx.models.load import context_of, frozen_model, load_tokenizer
from sddx.models.outputs import require_own_head
from sddx.parallel.launch import sharded
from sddx.records import Artifact, Units
from sddx.runtime import Runtime


def score(
    out: Path,
    *,
    base: Artifact,
    files: Sequence[Artifact],
    runtime: Runtime,
    metrics: dict[str, dict[str, Any]],
    units: str,
    calibration: dict[str, Any],
    dtype: str,
    attention: str,
) -> None:
    """Writes `scores.json`: by the name of each metric its mean and standard error over the calibration texts, and
    its means over parts of them. Metrics of hidden states share one pass."""
    loading = {"dtype": dtype, "attention": attention}
    scores = _scores(base.path, placed(metrics, files), units, calibration, loading, runtime=runtime)
    (out / "scores.json").write_text(json.dumps(scores) + "\n", encoding="utf-8")
    runtime.log({f"score/{name}/sequences": summary["sequences"] for name, summary in scores.items()})


@sharded
def _scores(
    folder: Path,
    metrics: dict[str, dict[str, Any]],
    units: str,
    calibration: dict[str, Any],
    loading: dict[str, str],
    *,
    runtime: Runtime,
) -> dict[str, dict[str, Any]]:
    tokenizer = load_tokenizer(folder)
    teacher = frozen_model(folder, **loading, device=runtime.device)
    require_own_head(teacher)
    batches = list(text_batches(tokenizer, build(calibration), context=context_of(teacher.config)))
    subject = Subject(teacher, tokenizer, Units(units, len(blocks(teacher))), batches, runtime)
    return score_units(subject, {name: build(metric) for name, metric in metrics.items()})
