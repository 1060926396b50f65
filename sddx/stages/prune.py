"""prune: from scores to a cut, and the proof that the model stays sound under it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sddx.build import build
from sddx.models.anatomy import blocks
from sddx.models.load import load_model
from sddx.records import Artifact
from sddx.runtime import Runtime
from sddx.surgery.remove import remove_blocks
from sddx.surgery.soundness import prove

LARGEST_RELOAD = 2e9  # bytes; beyond this the proof writes no copy of the model to disk


def prune(
    out: Path,
    model: Artifact,
    *scores: Artifact,
    runtime: Runtime,
    choose: dict[str, Any],
    remove: int,
    dtype: str,
    attention: str,
) -> None:
    """Writes `cut.json` (the kept blocks), `proof.json` and the parameter counts; no weight is copied.

    Raises UserError where more blocks are to go than there are, UnsoundModel where a check fails.
    """
    found = json.loads((scores[0].path / "scores.json").read_text()) if scores else None
    student = load_model(model.path, dtype=dtype, attention=attention, device=runtime.device)
    parameters = {"unpruned": _count(student)}
    cut = build(choose)(found, len(blocks(student)), remove)
    remove_blocks(student, cut)
    parameters["pruned"] = _count(student)
    size = sum(weight.numel() * weight.element_size() for weight in student.parameters())
    proof = prove(student, vocabulary=student.config.get_text_config().vocab_size, reload=size < LARGEST_RELOAD)
    cut.save(out / "cut.json")
    (out / "proof.json").write_text(json.dumps(proof) + "\n")
    (out / "parameters.json").write_text(json.dumps(parameters) + "\n")
    runtime.log({"prune/removed": len(cut.removed), "prune/parameters": parameters["pruned"]})


def _count(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())
