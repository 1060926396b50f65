"""Imports run downhill, and the maths stands alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sddx

ROOT = Path(sddx.__file__).parent
LEVELS = [
    {"records", "runtime", "lines"},
    {
        "arguments", "build", "store", "ranges", "config", "entry", "hub", "tracking", "parallel", "surgery.choose",
        "importance.metrics", "training.losses",
    },
    {"models", "data", "importance", "surgery", "evaluation"},
    {"training", "report", "tiny", "sweep", "estimate"},
    {"stages", "compare", "precheck", "export", "bench", "rehearse"},
    {"train"},
    {"plan", "fetch"},
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
    assert imported(path) <= {"records"}


def test_reports_need_no_torch() -> None:
    """Tables are drawn on a machine that has no torch, so no module of the room may import it."""
    for path in (ROOT / "report").glob("*.py"):
        assert "import torch" not in path.read_text() and "from torch" not in path.read_text()
