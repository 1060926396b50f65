"""capture: what the teacher says of every answer token of one shard of rows, for trainings without it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sddx.data.encode import Encoded, collate, encode_all, padding_id, text_spans
from sddx.models.load import frozen_model, load_tokenizer, text_config
from sddx.models.outputs import run
from sddx.parallel.distributed import rank
from sddx.parallel.launch import sharded
from sddx.records import Artifact, Batch, Coarse
from sddx.runtime import Runtime
from sddx.stages.inputs import count_rows
from sddx.stages.rows import examples_of, room
from sddx.students.cached import MANIFEST, Writer, origin, row_key
from sddx.training.coarse import CHUNK, likeliest, mass

SURE = 0.99  # the mass of a token that is told to be captured


def capture(
    out: Path,
    *,
    base: Artifact,
    rows: Artifact,
    teacher: Artifact | None = None,
    runtime: Runtime,
    k: int,
    temperature: float,
    selfdata: dict[str, Any],
    max_length: int,
    dtype: str,
    attention: str,
) -> None:
    """Writes `ids.npy` and `logs.npy`, the `Coarse` distributions of the teacher (the base model where there is no
    other) at every answer token of the rows, and `capture.json`: what they are of, the rows, and the mass that the
    `k` likeliest tokens have. `rows` are reference examples or rewrites, of which `selfdata` says what becomes of
    refused ones; they are encoded by the base's tokenizer, as for a training."""
    tokenizer, length = load_tokenizer(base.path), room(base.path, max_length)
    encoded, _ = encode_all(tokenizer, examples_of([rows], selfdata), max_length=length, tell=False)
    model = teacher or base
    vocabulary = text_config(model.path).vocab_size
    asked = {"vocabulary": vocabulary, "k": k, "temperature": temperature, "max_length": length}
    settings = {**asked, "folder": model.path, "loading": {"dtype": dtype, "attention": attention}}
    held = _captured(out, encoded, padding_id(tokenizer), settings, runtime=runtime)
    if left_out := count_rows(rows) - len(encoded):
        runtime.log({"capture/rows": left_out, "capture/mass": float(held.mean()) if len(held) else 0.0})
    captured = {"positions": len(held), "mass": float(held.sum()), "sure": int((held > SURE).sum())}
    keys = [[row_key(row.input_ids, row.labels), row.supervised] for row in encoded]
    about = {"origin": origin(model.key, tokenizer, **asked), "captured": captured, "rows": keys}
    (out / MANIFEST).write_text(json.dumps(about) + "\n", encoding="utf-8")


@sharded
def _captured(
    out: Path, rows: Sequence[Encoded], pad_id: int, settings: dict[str, Any], *, runtime: Runtime
) -> torch.Tensor:
    """Writes the files; returns the mass that was captured at each position, rows of like length side by side."""
    model = frozen_model(settings["folder"], **settings["loading"], device=runtime.device)
    k, counts = settings["k"], [row.supervised for row in rows]
    writer = Writer(out, counts, k, min(k + 1, settings["vocabulary"])) if rank() == 0 else None
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row].input_ids))
    seen = [torch.zeros(0)]
    for first, end in text_spans([len(rows[row].input_ids) for row in order]) if rows else []:
        members = order[first:end]
        batch = collate([rows[row] for row in members], pad_id).to(runtime.device)
        coarse = _said(model, batch, partial(likeliest, k=k, temperature=settings["temperature"]))
        if writer is not None:
            writer.put(members, coarse)
        seen.append(mass(coarse).cpu())
        runtime.log({"capture/rows": len(members), "capture/mass": seen[-1].mean().item()})
    return torch.cat(seen)


@torch.no_grad()
def _said(model: Any, batch: Batch, reduced: Any) -> Coarse:
    """What the model says at the labelled positions of a batch; logits are made for CHUNK of them at a time."""
    outputs = run(model, batch.input_ids, batch.attention_mask)
    parts = [reduced(outputs.head(hidden)) for hidden in outputs.hidden[batch.labels != -100].split(CHUNK)]
    ids, logs = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "logs"))
    return Coarse(ids, logs, parts[0].temperature)
