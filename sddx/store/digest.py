"""What decides a stage's result, as text that can be hashed: its settings, its inputs and its source."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from sddx.records import Artifact
from sddx.store import sources
from sddx.store.sources import Reached

# Smaller files are always read: a rewrite within one tick of the clock keeps size and time.
SMALL = 16 * 2**20
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Recipe:
    """Everything that may change a stage's numbers. `source` is what the stage and all `_target_`s reach; `wired`
    is `spec` with each `_target_` replaced by a digest of what it alone reaches."""

    stage: str
    spec: dict[str, Any]
    wired: dict[str, Any]
    inputs: tuple[tuple[str, Artifact], ...]
    source: Reached

    @cached_property
    def sources(self) -> dict[str, str]:
        """The digest of each definition by where it stands, and each third-party version."""
        ours = {one.where: one.digest[:16] for one in self.source.definitions}
        return dict(sorted({**ours, **{top: sources.version(top) for top in self.source.packages}}.items()))

    @property
    def described(self) -> dict[str, Any]:
        """What a manifest says of it."""
        inputs = [{"name": name, "stage": each.stage, "key": each.key} for name, each in self.inputs]
        return {"stage": self.stage, "key": self.key, "spec": self.spec, "inputs": inputs, "sources": self.sources}

    @cached_property
    def settings(self) -> str:
        """The digest of all but the source; artifacts that differ in their source alone share it."""
        return digest([self.stage, _renamed(self.spec, _name), [each.key for _, each in self.inputs]])

    @cached_property
    def key(self) -> str:
        """The key of the artifact: a digest of settings, inputs and the code that a number can hang on."""
        inputs = [[name, each.reading] for name, each in self.inputs]
        return digest([self.settings, self.wired, inputs, _summed(self.source)])


def recipe(
    stage: Callable[..., Any], inputs: Mapping[str, Artifact | Sequence[Artifact] | None], spec: dict[str, Any]
) -> Recipe:
    """The recipe of the call `stage(out, **inputs, **spec)`.

    Raises TypeError where a value of `spec` has no plain JSON form or the stage is in no file, UserError where a
    `_target_` is not found.
    """
    settings = {key: plain(value, key) for key, value in spec.items()}
    wired = _renamed(settings, lambda target: digest(_summed(sources.reached(target))))
    named = tuple((name, each) for name, artifacts in inputs.items() for each in _listed(artifacts))
    every = [stage_source(stage), *map(sources.reached, _targets(settings))]
    return Recipe(stage.__name__, settings, wired, named, sources.together(every))


def _listed(artifacts: Artifact | Sequence[Artifact] | None) -> Sequence[Artifact]:
    if artifacts is None:
        return ()
    return (artifacts,) if isinstance(artifacts, Artifact) else artifacts


def stage_source(stage: Callable[..., Any]) -> Reached:
    """What a stage reaches. Raises TypeError for one that is not a function in a file."""
    module = sys.modules.get(stage.__module__)  # None: it is imported where it runs
    if module and not getattr(module, "__file__", None):
        raise TypeError(f"the stage {stage.__name__} must be a function in a file: its source is hashed")
    name = module.__spec__.name if module and module.__spec__ else stage.__module__
    return sources.reached(f"{name}.{stage.__name__}")


def _summed(source: Reached) -> list[list[str]]:
    """What a source comes to, wherever its definitions stand."""
    ours = [[one.name, one.digest] for one in source.definitions]
    return sorted(ours) + sorted([top, sources.version(top)] for top in source.packages)


def _renamed(value: Any, name: Callable[[str], str]) -> Any:
    """Settings in which every `_target_` has another name."""
    if isinstance(value, list):
        return [_renamed(entry, name) for entry in value]
    if not isinstance(value, dict):
        return value
    renamed = {key: _renamed(entry, name) for key, entry in value.items()}
    if isinstance(value.get("_target_"), str):
        renamed["_target_"] = name(value["_target_"])
    return renamed


def _name(target: str) -> str:
    """A `_target_` without where it stands, so that a module can move."""
    return sources.name(target) or target


def digest(value: Any) -> str:
    """SHA-256 (hex) of a plain value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any, name: str) -> Any:
    """`value` with its tuples as lists; TypeError names the entry (`name`) that JSON cannot hold exactly."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(entry, f"{name}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, f"{name}.{place}") for place, entry in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and isfinite(value)):
        return value
    raise TypeError(
        f"the setting '{name}' cannot be hashed: {value!r} is a {type(value).__name__}; "
        "give text, a finite number, true or false, null, or lists and mappings (with text keys) of these"
    )


def _targets(value: Any) -> Iterator[str]:
    """Every `_target_` anywhere in a plain value."""
    if isinstance(value, dict):
        if isinstance(value.get("_target_"), str):
            yield value["_target_"]
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _targets(entry)


def checksum(path: Path, known: dict[str, Any] | None = None) -> str:
    """SHA-256 (hex) of a file's bytes. A large file is not read where the hub's cache names it by its checksum, nor
    again where its size and time of change are those of `known` (`size`, `mtime_ns`, `sha256`)."""
    stat = path.stat()
    if stat.st_size >= SMALL:
        blob = path.resolve()
        if blob.parent.name == "blobs" and SHA256.fullmatch(blob.name):
            return blob.name
        if known is not None and (stat.st_size, stat.st_mtime_ns) == (known["size"], known["mtime_ns"]):
            return known["sha256"]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record(path: Path, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file's checksum, its size in bytes and its time of change in nanoseconds."""
    stat = path.stat()
    return {"sha256": checksum(path, known), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
