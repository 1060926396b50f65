"""The rooms of the package by what they import, for docs/architecture.md: `python docs/architecture.py`."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "sddx"
PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- made by docs/architecture.py -->\n", "<!-- end -->\n"


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The modules and rooms of ours that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    named = [(node.module, node.names) for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    whole = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    whole += [f"sddx.{alias.name}" for module, names in named if module == "sddx" for alias in names]
    ours = [name for name in [*whole, *(module for module, _ in named)] if name.startswith("sddx.")]
    return {name.removeprefix("sddx.") for name in ours}


def imports() -> dict[str, set[str]]:
    """By room, or module beside the rooms, those that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in ROOT.rglob("*.py"):
        found[room(path)] |= {name.split(".")[0] for name in imported(path)} - {room(path)}
    found.pop("__init__")
    return found


def about(name: str) -> str:
    """The first sentence that a room or a module says of itself."""
    folder = ROOT / name
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def picture() -> str:
    """A table of the rooms, the highest first: what each is for, and what it imports."""
    below = imports()

    @cache
    def level(name: str) -> int:
        return 1 + max((level(other) for other in below.get(name, ())), default=-1)

    names = sorted({*below, *(other for each in below.values() for other in each)}, key=lambda n: (-level(n), n))
    rows = [f"| {level(n)} | `{n}` | {about(n)} | {', '.join(sorted(below.get(n, ())))} |" for n in names]
    return "\n".join(["| level | room | what it is for | imports |", "|---:|---|---|---|", *rows]) + "\n"


def page(text: str) -> str:
    """The page with the table of today in it."""
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return before + BEGIN + "\n" + picture() + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
