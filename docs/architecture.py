"""The rooms by what they import, for docs/architecture.md and its picture: `python docs/architecture.py`."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "sddx"
PAGE, DRAWING = (Path(__file__).with_suffix(suffix) for suffix in (".md", ".svg"))
WIDTH, HEIGHT, ROW, BOX = 860, 26, 62, 106  # of all, of a box, of a level, across a box
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


def levels(below: dict[str, set[str]]) -> dict[str, int]:
    """By room, the highest first, how many stand below it at most, one upon the other."""

    @cache
    def level(name: str) -> int:
        return 1 + max((level(other) for other in below.get(name, ())), default=-1)

    names = {*below, *(other for each in below.values() for other in each)}
    return {name: level(name) for name in sorted(names, key=lambda name: (-level(name), name))}


def table() -> str:
    """The rooms, the highest first: what each is for, and what it imports."""
    below = imports()
    at = levels(below)
    rows = [f"| {at[n]} | `{n}` | {about(n)} | {', '.join(sorted(below.get(n, ())))} |" for n in at]
    return "\n".join(["| level | room | what it is for | imports |", "|---:|---|---|---|", *rows]) + "\n"


def page(text: str) -> str:
    """The page with the table of today in it."""
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return before + BEGIN + "\n" + table() + "\n" + END + after


def direct(below: dict[str, set[str]]) -> dict[str, list[str]]:
    """What each room imports that it does not reach over another of its imports."""

    @cache
    def reached(name: str) -> frozenset[str]:
        return frozenset(below.get(name, ())).union(*(reached(other) for other in below.get(name, ())))

    return {
        name: sorted(each for each in others if not any(each in reached(other) for other in others))
        for name, others in below.items()
    }


def places(at: dict[str, int], lines: dict[str, list[str]]) -> dict[str, tuple[float, float]]:
    """The middle of each room's box: a row a level, in which rooms stand near those above that import them."""
    found: dict[str, tuple[float, float]] = {}
    top = max(at.values())
    for level in range(top, -1, -1):
        row = [name for name in at if at[name] == level]
        above = {name: [found[other][0] for other in found if name in lines.get(other, ())] for name in row}
        row.sort(key=lambda name: (sum(above[name]) / len(above[name]) if above[name] else WIDTH / 2, name))
        for number, name in enumerate(row):
            found[name] = (WIDTH * (number + 0.5) / len(row), ROW * (top - level) + HEIGHT)
    return found


def drawing() -> str:
    """The rooms and their imports, as SVG: what a room reaches over another is not drawn."""
    below = imports()
    lines, at = direct(below), levels(below)
    middle = places(at, lines)
    height = ROW * max(at.values()) + 2 * HEIGHT
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" font-size="14">']
    parts.append("<title>The rooms of sddx: each imports those that lines lead down to</title>")
    for name, others in sorted(lines.items()):
        for other in others:
            (x, y), (to_x, to_y) = middle[name], middle[other]
            bend = f"{x:.0f} {y + ROW / 2:.0f} {to_x:.0f} {to_y - ROW / 2:.0f} {to_x:.0f} {to_y:.0f}"
            parts.append(f'<path d="M{x:.0f} {y:.0f} C{bend}" fill="none" stroke="#8a97a6" stroke-width="1.2"/>')
    for name, (x, y) in middle.items():
        box = f'x="{x - BOX / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{BOX}" height="{HEIGHT}" rx="5"'
        parts.append(f'<rect {box} fill="#eef3f8" stroke="#0072b2"/>')
        parts.append(f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" fill="#1b1f24">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    DRAWING.write_text(drawing(), encoding="utf-8")
