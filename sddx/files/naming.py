"""Names that file systems and tables can carry."""

from __future__ import annotations

import hashlib
import re

MOST = 120  # bytes of a file's name: file systems allow 255, and what is written beside it has a longer name


def shortened(text: str, most: int) -> str:
    """A text of at most so many bytes: a longer one keeps its ends, between them the head of its SHA-256, by which
    texts that differ in the middle stay apart."""
    raw = text.encode(errors="backslashreplace")
    if len(raw) <= most:
        return text
    half, digest = (most - 10) // 2, hashlib.sha256(raw).hexdigest()[:8]
    head, tail = (part.decode(errors="ignore") for part in (raw[:half], raw[-half:]))
    return f"{head}~{digest}~{tail}"


def file_name(text: str) -> str:
    """The name of one file or folder that a text gives: without separators and signs that no screen shows, not too
    long, and never the folder itself or the one above it."""
    return shortened(re.sub(r"[/\\\x00-\x1f\x7f\ud800-\udfff]|^\.{0,2}$", "_", text), MOST)
