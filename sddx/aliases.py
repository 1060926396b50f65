"""Old names of modules: `python -m sddx.plan` and a user's `_target_: sddx.surgery.choose.Pruning` go on, and say
what they are called now."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

MOVED = {
    "sddx.arguments": "sddx.config.arguments",
    "sddx.bench": "sddx.commands.bench",
    "sddx.build": "sddx.config.build",
    "sddx.compare": "sddx.commands.compare",
    "sddx.data.told": "sddx.data.remarks",
    "sddx.data.vllm": "sddx.engines.writing",
    "sddx.data.vllm_worker": "sddx.engines.writing_worker",
    "sddx.entry": "sddx.config.entry",
    "sddx.evaluation.statistics": "sddx.statistics.intervals",
    "sddx.evaluation.vllm": "sddx.engines.judging",
    "sddx.evaluation.vllm_worker": "sddx.engines.judging_worker",
    "sddx.export.__main__": "sddx.commands.export",
    "sddx.fetch": "sddx.commands.fetch",
    "sddx.lines": "sddx.files.lines",
    "sddx.models.convert": "sddx.gguf.convert",
    "sddx.models.gguf": "sddx.gguf.model",
    "sddx.models.gguf_tokenizer": "sddx.gguf.tokenizer",
    "sddx.models.packaged": "sddx.gguf.packaged",
    "sddx.models.plain": "sddx.students.plain",
    "sddx.models.recovered": "sddx.students.recovered",
    "sddx.models.student": "sddx.students.student",
    "sddx.models.teacher": "sddx.students.teacher",
    "sddx.models.vllm": "sddx.engines.settings",
    "sddx.naming": "sddx.files.naming",
    "sddx.plan": "sddx.commands.plan",
    "sddx.precheck": "sddx.stages.check",
    "sddx.printing": "sddx.config.printing",
    "sddx.ranges": "sddx.config.values",
    "sddx.rehearse": "sddx.tiny.rehearse",
    "sddx.report.__main__": "sddx.commands.report",
    "sddx.shapes": "sddx.files.shapes",
    "sddx.store.__main__": "sddx.commands.store",
    "sddx.store.lock": "sddx.files.lock",
    "sddx.store.why": "sddx.commands.why",
    "sddx.surgery": "sddx.compression",  # with all that is in it
    "sddx.surgery.trial": "sddx.students.trial",
    "sddx.sweep.__main__": "sddx.commands.sweep",
}


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("sddx.") or (new := current(name)) == name:
            return None
        if (spec := importlib.util.find_spec(new)) is None:
            return None
        is_room = spec.submodule_search_locations is not None
        # the origin is what `python -m` gives to Hydra
        return importlib.util.spec_from_loader(name, _Alias(name, new), origin=spec.origin, is_package=is_room)


class _Alias(Loader):
    """Loads a module under its old name: the same object, so that its classes are the same."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._tell()
        module = importlib.import_module(self.new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # which the import has put its own in place of

    def get_code(self, name: str) -> CodeType | None:
        """For `python -m`."""
        self._tell()
        spec = importlib.util.find_spec(self.new)
        return spec.loader.get_code(self.new) if spec and spec.loader else None  # type: ignore[attr-defined]

    def _tell(self) -> None:
        warnings.warn(f"{self.old} is called {self.new} now.", FutureWarning, stacklevel=2)


def current(dotted: str) -> str:
    """A dotted name as it is today."""
    parts = dotted.split(".")
    for length in range(len(parts), 1, -1):
        old = ".".join(parts[:length])
        if new := MOVED.get(old):
            return ".".join([new, *parts[length:]])
    return dotted


def install() -> None:
    """Find modules by their old names as well."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before folders that an older version left
