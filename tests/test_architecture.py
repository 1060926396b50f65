"""Imports run downhill, and the maths stands alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sddx

ROOT = Path(sddx.__file__).parent
LEVELS = [
    {"errors", "records", "runtime", "lines", "shapes", "naming", "printing"},
    {
        "arguments", "build", "store", "ranges", "config", "run_folder", "entry", "hub", "tracking", "parallel",
        "surgery.choose", "importance.metrics", "training.losses",
    },
    {"models", "data", "importance", "surgery", "evaluation"},
    {"training", "report", "tiny", "sweep", "estimate"},
    {"stages", "inputs", "compare", "precheck", "export", "bench", "rehearse"},
    {"pipeline"},
    {"train"},
    {"plan", "fetch", "store.why", "store.__main__"},
]  # fmt: skip
PURE = {"importance.metrics", "surgery.choose", "training.losses"}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def level(module: str) -> int:
    names = [module, module.split(".")[0]]
    return next(number for name in names for number, rooms in enumerate(LEVELS) if name in rooms)


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.removeprefix("sddx.") for name in names if name.startswith("sddx.")}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_no_module_imports_a_room_above_it(path: Path) -> None:
    here = level(dotted(path))
    above = {name for name in imported(path) if level(name) > here}
    assert not above


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_maths_imports_nothing_of_ours_but_records(module: str) -> None:
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert imported(path) <= {"records", "errors"}


def test_reports_need_no_torch() -> None:
    """Tables are drawn on a machine that has no torch, so no module of the room may import it."""
    for path in (ROOT / "report").glob("*.py"):
        assert "import torch" not in path.read_text() and "from torch" not in path.read_text()


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
