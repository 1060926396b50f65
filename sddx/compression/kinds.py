"""The kinds of compression, by the name that a run has for the artifact of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from sddx.compression.compressed import Compression
from sddx.compression.junction import Junction
from sddx.compression.remove import Removal
from sddx.records import Artifact

KINDS: dict[str, Callable[[Path], Compression]] = {"cut": Removal.load, "patch": Junction.load}


def read(folders: Mapping[str, Artifact | Path | None]) -> tuple[Compression, ...]:
    """What these artifacts (or their folders) say is done to a model, in the order of `KINDS`.

    Raises TypeError for a name that is none of a kind: a stage was given an input that it does not know."""
    if unknown := folders.keys() - KINDS.keys():
        raise TypeError(f"{', '.join(sorted(unknown))} is no kind of compression ({', '.join(KINDS)})")
    paths = {name: each.path if isinstance(each, Artifact) else each for name, each in folders.items()}
    return tuple(load(folder) for name, load in KINDS.items() if (folder := paths.get(name)))
