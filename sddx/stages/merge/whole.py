"""Students as whole models on disk, and what is made of them there."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sddx.compression.compressed import Compression
from sddx.merging.files import Method, merge_files
from sddx.models.load import free_memory
from sddx.records import Artifact
from sddx.students.plain import write_merged
from sddx.students.student import load_student


@contextmanager
def whole(
    out: Path, base: Artifact, students: Sequence[Artifact], done: Sequence[Compression], **loading: str
) -> Iterator[list[Path]]:
    """Folders of these students, adapters worked into their weights, and last that of the pruned model before
    training. They are in `out`, and gone afterwards."""
    free_memory()
    with TemporaryDirectory(dir=out) as name:
        folders = []
        for number, trained in enumerate([*(student.path for student in students), None]):
            model = load_student(base.path, trained, done=done, base=base.key, **loading).model
            folders.append(Path(name) / (f"student-{number}" if trained else "untrained"))
            write_merged(model, base.path, folders[-1])
            del model
        yield folders


def merge_into(
    out: Path, folders: Sequence[Path], method: Method, tick: Callable[[int], Any] = lambda count: None
) -> Counter[str]:
    """Make one model of such folders, which transformers loads from `out`: how many tensors took which way. Raises
    UserError, before a tensor is merged, where they are not of one shape."""
    ways = merge_files(folders[:-1], folders[-1], out, method, tick)
    for path in folders[0].iterdir():
        if path.is_file() and not (out / path.name).exists():
            shutil.copy(path, out / path.name)
    return ways
