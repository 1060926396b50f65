"""An artifact as a store holds it, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sddx.store import manifest

FIELDS: dict[str, Any] = {
    "stage": "score", "key": "0" * 64, "created": "2026-01-01T00:00:00", "seconds": 30.0, "peak_memory": 2**20,
    "spec": {}, "inputs": [], "sources": {},
}  # fmt: skip


def artifact(root: Path, stage: str, key: str = "0" * 64, files: dict[str, str] | None = None) -> Path:
    """The folder of a complete artifact in the store at `root`, with these files."""
    folder = root / stage / "settings" / key
    folder.mkdir(parents=True)
    for name, text in (files or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    manifest.write(folder, FIELDS | {"stage": stage, "key": key})
    return folder
