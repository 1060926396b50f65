"""drift: how far a pruned or recovered model moved from the unpruned one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sddx.compression.kinds import read
from sddx.compression.remove import cut_of
from sddx.config.build import build
from sddx.data.shards import read_examples, read_rows
from sddx.drift.measure import Material
from sddx.drift.reading import Reading
from sddx.models.load import context_of, load_tokenizer
from sddx.records import REWRITES_FILE, Artifact, Rewrite
from sddx.runtime import Runtime
from sddx.students.teacher import both


def drift(
    out: Path,
    *,
    base: Artifact,
    rows: Artifact,
    files: Sequence[Artifact],
    rewrites: Artifact | None = None,
    student: Artifact | None = None,
    runtime: Runtime,
    measured: dict[str, Any],
    text: dict[str, Any],
    selfdata: dict[str, Any],
    check: dict[str, Any] | None,
    max_length: int,
    dtype: str,
    attention: str,
    **compressions: Artifact | None,
) -> None:
    """Writes `drift.json`: what `measured`, a `sddx.drift.measure.Drift`, finds on held-out `rows` and the texts of
    `text`, which are read from `files`. The model is the one after the `compressions`, or the recovered one where
    there is a `student`. `rewrites` are the unpruned model's answers to the same rows, and `selfdata` says what
    becomes of refused ones; `check` tells right answers where pass@k is asked for."""
    loading: dict[str, Any] = {"dtype": dtype, "attention": attention, "device": runtime.device}
    done, measure = read(compressions), build(measured)
    unpruned, model = both(base, done, student, **loading)
    context = context_of(model.config)
    tokenizer = load_tokenizer(base.path)
    material = _material(rows, rewrites, selfdata, build(text))
    material = replace(material, check=build(check)) if check else material
    with runtime.progress(total=measure.steps(material), what="drift", unit="row") as bar:
        reading = Reading(tokenizer, max_length, context, measure.batch_size, runtime.device, bar.update)
        record = measure(unpruned, model, cut_of(done).kept, material, reading)
        bar.update(bar.total - bar.n)  # texts that were not needed
    (out / "drift.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    runtime.log({f"drift/kl_{name}": each["nats"] for name, each in record["kl"].items()})


def _material(
    rows: Artifact, rewrites: Artifact | None, selfdata: dict[str, Any], texts: Sequence[str]
) -> Material:
    references = read_examples(rows.path)
    written = read_rows(Rewrite, rewrites.path / REWRITES_FILE) if rewrites else []
    return Material(references, build(selfdata)(written) if rewrites else references, written, texts)
