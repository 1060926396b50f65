"""Where what each stage knows of itself stands."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from sddx import stages

# A folder each, in the order of a run.
STAGES = (
    "prepare",
    "score",
    "prune",
    "patch",
    "distill",
    "select",
    "capture",
    "train",
    "shares",
    "merge",
    "draft",
    "drift",
    "written",
    "evaluate",
    "overlap",
    "report",
)


def stage(name: str) -> Callable[..., None]:
    """The stage of this name, as a function whose code is imported where it runs: what the store has already needs
    none of the libraries that made it."""

    def run(out: Path, **arguments: Any) -> None:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a bar for every loaded model hides those that matter
        getattr(import_module(run.__module__), name)(out, **arguments)

    run.__name__, run.__module__ = name, f"{stages.__name__}.{name}.run"
    return run


@cache
def modules(kind: str) -> dict[str, ModuleType]:
    """By stage, in their order, its module of this kind (`check`, `cost`), where it has one. A stage of which this
    file does not know the place comes last."""
    folders = [each.name for each in pkgutil.iter_modules(stages.__path__) if each.ispkg]
    ordered = sorted(folders, key=lambda stage: STAGES.index(stage) if stage in STAGES else len(STAGES))
    names = {stage: f"{stages.__name__}.{stage}.{kind}" for stage in ordered}
    return {stage: import_module(name) for stage, name in names.items() if find_spec(name)}
