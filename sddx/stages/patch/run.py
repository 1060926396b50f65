"""patch: what stands in for the removed parts, fitted on calibration text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from sddx.compression.compressed import compress
from sddx.compression.fit import fit_patches
from sddx.compression.junction import Junction
from sddx.compression.kinds import read
from sddx.config.build import build
from sddx.data.encode import text_batches
from sddx.models.anatomy import blocks
from sddx.models.load import context_of, free_memory, frozen_model, load_model, load_tokenizer
from sddx.parallel.distributed import is_joined, rank
from sddx.parallel.launch import sharded
from sddx.records import CUT_FILE, Artifact, Cut
from sddx.runtime import Runtime
from sddx.stages.prune.run import footprint, write_proof


def patch(
    out: Path,
    *,
    base: Artifact,
    cut: Artifact,
    files: Sequence[Artifact],
    runtime: Runtime,
    patch: dict[str, Any],
    calibration: dict[str, Any],
    dtype: str,
    attention: str,
) -> None:
    """Writes the patches, `fit.json` (by gap, the share of the removed update that they leave unexplained), and
    `proof.json` and `size.json` of the patched model.

    Raises UserError where a patch cannot stand in for what was removed, cannot be folded, or saw too little.
    """
    loading = {"dtype": dtype, "attention": attention}
    unexplained = _fitted(out, base.path, cut.path, patch, calibration, loading, runtime=runtime)
    if runtime.shards == 1:
        free_memory()
    loading["device"] = runtime.roomy  # for the proof, as in prune
    made = compress(load_model(base.path, **loading), read({"cut": cut, "patch": out}))
    made.thaw()
    write_proof(out, made, base, loading)
    (out / "size.json").write_text(json.dumps({"pruned": footprint(made.model)}) + "\n", encoding="utf-8")
    (out / "fit.json").write_text(json.dumps(unexplained) + "\n", encoding="utf-8")
    runtime.log({f"patch/unexplained/{name}": share for name, share in unexplained.items()})


@sharded
def _fitted(
    out: Path,
    folder: Path,
    cut: Path,
    patch: dict[str, Any],
    calibration: dict[str, Any],
    loading: dict[str, str],
    *,
    runtime: Runtime,
) -> dict[str, float]:
    """Writes the patches and returns what they leave unexplained."""
    tokenizer = load_tokenizer(folder)
    teacher = frozen_model(folder, **loading, device=runtime.device)
    batches = list(text_batches(tokenizer, build(calibration), context=context_of(teacher.config)))

    def block(place: int) -> Any:
        """One that may be trained; out of shards none can be copied."""
        return deepcopy(blocks(load_model(folder, **loading) if is_joined() else teacher)[place]).to(runtime.device)

    what = Cut.load(cut / CUT_FILE)
    patches, unexplained = fit_patches(teacher, what, lambda: build(patch["fit"]), batches, runtime, block)
    if rank() == 0:
        Junction(patches, patch["trained"], patch["fold"]).save(out)
    return unexplained
