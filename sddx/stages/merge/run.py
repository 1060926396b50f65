"""merge: several students of one cut become one (arXiv 2410.09982 merges by SLERP)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sddx.compression.kinds import read
from sddx.compression.remove import cut_of
from sddx.config.build import build
from sddx.merging.files import merge_files, shards
from sddx.models.load import free_memory
from sddx.records import Artifact
from sddx.runtime import Runtime
from sddx.students.plain import write_merged
from sddx.students.student import load_student, write_origin


def merge(
    out: Path,
    *,
    base: Artifact,
    students: Sequence[Artifact],
    runtime: Runtime,
    method: dict[str, Any],
    dtype: str,
    attention: str,
    **compressions: Artifact | None,
) -> None:
    """Writes the merged model as a folder that transformers loads, tied to the cut and the base, and `merge.json`:
    how many tensors took which way (`arc`, `line`, `parent`). `compressions` were done to the base.

    The students, and the pruned model before training, are written whole first (adapters worked into weights), then
    merged shard by shard. Raises UserError, before a tensor is merged, where they are not of one shape."""
    loading = {"dtype": dtype, "attention": attention, "device": runtime.roomy}
    done = read(compressions)
    free_memory()
    with TemporaryDirectory(dir=out) as name:
        folders = []
        for number, trained in enumerate([*(student.path for student in students), None]):
            model = load_student(base.path, trained, done=done, base=base.key, **loading).model
            folders.append(Path(name) / (f"student-{number}" if trained else "untrained"))
            write_merged(model, base.path, folders[-1])
            del model
        count = sum(map(len, shards(folders[0]).values()))
        with runtime.progress(total=count, what="merging", unit="tensor") as bar:
            ways = merge_files(folders[:-1], folders[-1], out, build(method), bar.update)
        for path in folders[0].iterdir():
            if path.is_file() and not (out / path.name).exists():
                path.rename(out / path.name)
    write_origin(out, cut_of(done), base.key)
    (out / "merge.json").write_text(json.dumps({"ways": dict(ways)}) + "\n", encoding="utf-8")
    runtime.log({f"merge/{way}": number for way, number in ways.items()})
