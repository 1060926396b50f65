"""merge: several students of one cut become one (arXiv 2410.09982 merges by SLERP)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sddx.compression.kinds import read
from sddx.compression.remove import cut_of
from sddx.config.build import build
from sddx.merging.files import shards
from sddx.merging.search import with_shares
from sddx.records import SHARES_FILE, Artifact
from sddx.runtime import Runtime
from sddx.stages.merge.whole import merge_into, whole
from sddx.students.student import write_origin


def merge(
    out: Path,
    *,
    base: Artifact,
    students: Sequence[Artifact],
    shares: Artifact | None = None,
    runtime: Runtime,
    method: dict[str, Any],
    dtype: str,
    attention: str,
    **compressions: Artifact | None,
) -> None:
    """Writes the merged model as a folder that transformers loads, tied to the cut and the base, and `merge.json`:
    how many tensors took which way (`arc`, `line`, `parent`). `compressions` were done to the base; `shares` say
    how much of the second student each block takes, where that was searched for.

    The students, and the pruned model before training, are written whole first (adapters worked into weights), then
    merged tensor by tensor. Raises UserError, before a tensor is merged, where they are not of one shape."""
    done = read(compressions)
    if shares:
        method = with_shares(method, json.loads((shares.path / SHARES_FILE).read_text(encoding="utf-8")))
    with whole(out, base, students, done, dtype=dtype, attention=attention, device=runtime.roomy) as folders:
        count = sum(map(len, shards(folders[0]).values()))
        with runtime.progress(total=count, what="merging", unit="tensor") as bar:
            ways = merge_into(out, folders, build(method), bar.update)
    write_origin(out, cut_of(done), base.key)
    (out / "merge.json").write_text(json.dumps({"ways": dict(ways)}) + "\n", encoding="utf-8")
    runtime.log({f"merge/{way}": number for way, number in ways.items()})
