"""prune: from scores to a cut, and the proof that the model stays sound under it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sddx.compression.compressed import Compressed, compress
from sddx.compression.pattern import require_kept
from sddx.compression.remove import Removal
from sddx.compression.soundness import cache_bytes, is_small, prove, sliced_logits
from sddx.config.build import build
from sddx.models.anatomy import DECODER, blocks, decoder, vocabulary
from sddx.models.load import free_memory, load_model, text_config
from sddx.models.outputs import require_own_head
from sddx.records import CUT_FILE, Artifact, Units
from sddx.runtime import Runtime
from sddx.students.student import saved_and_loaded
from sddx.students.trial import try_out


def prune(
    out: Path,
    *,
    base: Artifact,
    scores: Artifact | None = None,
    runtime: Runtime,
    choose: dict[str, Any],
    remove: int,
    units: str,
    keep_pattern: bool = False,
    dtype: str,
    attention: str,
) -> None:
    """Writes `cut.json` (what stays), `proof.json` and `size.json` (parameters, and cache bytes per token, of
    both models); no weight is copied.

    Raises UserError where more is to go than there is or where `keep_pattern` asks for other blocks, UnsoundModel
    where a check fails.
    """
    scored = json.loads((scores.path / "scores.json").read_text(encoding="utf-8"))["pruning"] if scores else None
    # The proof compares whole weights and runs backward, once and over a few tokens: where they are in shards, it
    # takes its time in host memory, beside the processes that hold them.
    loading = {"dtype": dtype, "attention": attention, "device": runtime.roomy}
    if runtime.shards == 1:
        free_memory()  # a second copy of a large model has no room
    student = load_model(base.path, **loading)
    kinds = Units(units, len(blocks(student)))
    size = {"unpruned": footprint(student)}
    cut = kinds.cut(build(choose)(scored, len(kinds), remove))
    if keep_pattern:
        require_kept(decoder(student).config, cut)
    require_own_head(student)
    sliced = sliced_logits(student, cut, vocabulary=vocabulary(student))
    made = compress(student, [Removal(cut)])
    size["pruned"] = footprint(student)

    write_proof(out, made, base, loading, sliced=sliced, whole=made.whole[DECODER])
    cut.save(out / CUT_FILE)
    (out / "size.json").write_text(json.dumps(size) + "\n", encoding="utf-8")
    lost = cut.total - len(cut.kept), len(cut.no_attention), len(cut.no_feedforward)
    names = ("removed", "without_attention", "without_feedforward")
    row = {f"prune/{name}": count for name, count in zip(names, lost, strict=True)}
    runtime.log(row | {"prune/parameters": size["pruned"]["parameters"]})


def footprint(model: Any) -> dict[str, int]:
    """Parameters, and bytes of the cache per token."""
    return {"parameters": sum(w.numel() for w in model.parameters()), "cache_bytes": cache_bytes(model)}


def write_proof(out: Path, made: Compressed, base: Artifact, loading: dict[str, str], **known: Any) -> None:
    """Prove a pruned, maybe patched, model and write what was found to `proof.json`. Where its weights are too big
    to write a copy, a narrow model under the same cut makes the way through a folder, if one can be made; what was
    `reloaded` is written as well. `known`: see `prove`."""

    def again() -> Any:
        return saved_and_loaded(made, base.path, base=base.key, **loading)

    small = is_small(made.model)
    narrow = not small and try_out(text_config(base.path), made.cut, loading["attention"])
    proof = prove(made.model, vocabulary=vocabulary(made.model), again=again if small else None, **known)
    proof["reloaded"] = "model" if small else "narrow model" if narrow else None
    (out / "proof.json").write_text(json.dumps(proof) + "\n", encoding="utf-8")
