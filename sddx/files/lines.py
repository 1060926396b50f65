"""Text files whose lines end with a line feed, and nowhere else.

Python's `str.splitlines` also cuts at U+2028, U+0085 and others, which JSON leaves as they are inside a text.
"""

from __future__ import annotations

from pathlib import Path


def lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """The lines of a text file that hold more than white space. Raises OSError and UnicodeDecodeError as reading
    does."""
    return [line for line in path.read_text(encoding=encoding).split("\n") if line.strip()]
