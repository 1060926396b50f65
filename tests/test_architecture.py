"""Imports run downhill, and the maths stands alone."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

import sddx

pytestmark = pytest.mark.fast

ROOT = Path(sddx.__file__).parent
# Rooms, and the few modules beside them. Whatever imports another stands below it here, so there is no circle.
LEVELS = [
    {"errors", "runtime", "aliases", "statistics"},
    {"files", "records"},
    {"config", "store"},
    {"hub", "parallel", "run_folder", "tracking"},
    {"models"},
    {"compression", "data", "merging"},
    {"evaluation", "speculation", "students"},
    {"drift", "engines", "gguf", "importance", "training"},
    {"sweep"},
    {"estimate", "report"},
    {"export", "stages", "tiny"},
    {"pipeline"},
    {"train"},
    {"commands"},
]
PAGE = runpy.run_path(str(ROOT.parent / "docs" / "architecture.py"))
imported = PAGE["imported"]
PURE = {
    "importance.metrics", "compression.choose", "training.losses", "merging.methods", "statistics.intervals",
    "statistics.answers", "speculation.rules", "drift.passes", "drift.similarity",
}  # fmt: skip
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def level(module: str) -> int:
    return next(number for number, rooms in enumerate(LEVELS) if module.split(".")[0] in rooms)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_rooms_import_downhill_alone(path: Path) -> None:
    here, room = level(dotted(path)), dotted(path).split(".")[0]
    assert not {name for name in imported(path) if name.split(".")[0] != room and level(name) >= here}


def test_a_circle_of_rooms_would_be_seen(tmp_path: Path) -> None:
    """An import inside a function and one of a room as a whole count as well."""
    (tmp_path / "low.py").write_text("def late():\n    from sddx import students\n    import sddx.report.page\n")
    assert imported(tmp_path / "low.py") == {"students", "report.page"}
    assert level("students") > level("compression.remove") and level("report.page") > level("sweep.cells")


def test_the_page_on_architecture_says_what_is_so() -> None:
    """Its table is that of today's imports; else: python docs/architecture.py."""
    text = PAGE["PAGE"].read_text(encoding="utf-8")
    assert PAGE["page"](text) == text
    assert PAGE["drawing"]() == PAGE["DRAWING"].read_text(encoding="utf-8")


def test_the_picture_shows_every_room_and_leaves_out_what_another_line_says() -> None:
    """A room reaches by the drawn lines what it reaches by its imports, and every line leads down."""
    below = PAGE["imports"]()
    lines, at = PAGE["direct"](below), PAGE["levels"](below)

    def reached(by: dict) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name in reversed(at):  # the lowest first
            found[name] = set(by.get(name, ())).union(*(found[other] for other in by.get(name, ())))
        return found

    assert reached(lines) == reached(below)
    assert all(at[name] > at[other] for name, others in lines.items() for other in others)
    assert sum(map(len, lines.values())) < sum(map(len, below.values())) / 2
    drawing = PAGE["drawing"]()
    assert all(f">{name}</text>" in drawing for name in at)


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_maths_imports_nothing_of_ours_but_records(module: str) -> None:
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert {name.split(".")[0] for name in imported(path)} <= {"records", "errors", "statistics"}


def test_reports_need_no_torch() -> None:
    """Tables are drawn on a machine that has no torch, so no module of the room may import it."""
    for path in (ROOT / "report").glob("*.py"):
        assert "import torch" not in path.read_text() and "from torch" not in path.read_text()


def undocumented(body: list[ast.stmt], where: str = "") -> list[str]:
    """The public functions, classes and methods without a docstring, by their dotted names."""
    found = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
            "_"
        ):
            found += [] if ast.get_docstring(node) else [where + node.name]
            found += undocumented(node.body, f"{where}{node.name}.") if isinstance(node, ast.ClassDef) else []
    return found


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_what_is_public_says_what_it_is(path: Path) -> None:
    """Every module, function, class and method that others may use has a docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) and not undocumented(tree.body)


TEXT = ("read_text", "write_text", "open", "fdopen", "FileHandler")


def without_encoding(path: Path) -> list[int]:
    """The lines on which a file opens a text whose encoding is left to the machine."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    named = [(getattr(call.func, "attr", getattr(call.func, "id", "")), call) for call in calls]
    return [
        call.lineno
        for name, call in named
        if name in TEXT
        and not any(given.arg == "encoding" for given in call.keywords)
        and not any(isinstance(given, ast.Constant) and "b" in str(given.value) for given in call.args[:2])
    ]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_every_text_is_read_and_written_in_utf8(path: Path) -> None:
    """Else a locale decides what a file holds, and whether it can be written at all."""
    assert not without_encoding(path)
