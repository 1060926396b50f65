"""prune: from scores to a cut, and the proof that the model stays sound under it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from sddx.build import build
from sddx.models.anatomy import blocks
from sddx.models.load import load_model
from sddx.models.student import is_stock, load_student, save_student
from sddx.records import Artifact, Cut, Units
from sddx.runtime import Runtime
from sddx.surgery.remove import apply_cut
from sddx.surgery.soundness import cache_bytes, prove, saved_and_loaded

LARGEST_RELOAD = 2e9  # bytes; beyond this the proof writes no copy of the model to disk


def prune(
    out: Path,
    model: Artifact,
    *scores: Artifact,
    runtime: Runtime,
    choose: dict[str, Any],
    remove: int,
    units: str,
    dtype: str,
    attention: str,
) -> None:
    """Writes `cut.json` (what stays), `proof.json` and `size.json` (parameters, and cache bytes per token, of
    both models); no weight is copied.

    Raises UserError where more is to go than there is, UnsoundModel where a check fails.
    """
    found = json.loads((scores[0].path / "scores.json").read_text())["pruning"] if scores else None
    how = {"dtype": dtype, "attention": attention, "device": runtime.device}
    student = load_model(model.path, **how)
    kinds = Units(units, len(blocks(student)))
    size = {"unpruned": _size(student)}
    cut = kinds.cut(build(choose)(found, len(kinds), remove))
    apply_cut(student, cut)
    size["pruned"] = _size(student)

    def again() -> Any:
        return saved_and_loaded(student) if is_stock(cut) else _own_round_trip(student, model, cut, how)

    weights = sum(weight.numel() * weight.element_size() for weight in student.parameters())
    vocabulary = student.config.get_text_config().vocab_size
    proof = prove(student, vocabulary=vocabulary, again=again if weights < LARGEST_RELOAD else None)
    cut.save(out / "cut.json")
    (out / "proof.json").write_text(json.dumps(proof) + "\n")
    (out / "size.json").write_text(json.dumps(size) + "\n")
    lost = cut.total - len(cut.kept), len(cut.no_attention), len(cut.no_feedforward)
    names = ("removed", "without_attention", "without_feedforward")
    row = {f"prune/{name}": count for name, count in zip(names, lost, strict=True)}
    runtime.log(row | {"prune/parameters": size["pruned"]["parameters"]})


def _size(model: Any) -> dict[str, int]:
    return {"parameters": sum(w.numel() for w in model.parameters()), "cache_bytes": cache_bytes(model)}


def _own_round_trip(student: Any, model: Artifact, cut: Cut, how: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        save_student(student, Path(folder), cut=cut, base=model.key)
        return load_student(model.path, Path(folder), cut=cut, base=model.key, **how).model
