"""Several grids in one sweep: the blocks times the arms, then the sizes times the arms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from sddx.config import writable_folder
from sddx.config.entry import composing, mistakes_told
from sddx.errors import UserError


class Grids(Sweeper):
    """The product of `params`, as Hydra's own sweeper makes it, or of each of `grids` in turn, which are written
    alike and which `params` holds for too. The command line beats both. All cells go to the launcher at once.

    A value that names a setting which the sweep varies (`dataset.seed: ${seed}`) is each cell's own."""

    def __init__(self, *, params: dict[str, str] | None, grids: Sequence[dict[str, str]]) -> None:
        self.grids = _grids(params, grids)

    def require_values(self, arguments: Sequence[str]) -> None:
        """Raises UserError where a grid waits for a value that only another sweep can tell."""
        names = {argument.partition("=")[0] for argument in arguments}
        for grid in self.grids:
            owed = [name for name, values in grid.items() if values is None and name not in names]
            known = ", ".join(f"{name}={values}" for name, values in grid.items() if values is not None)
            if owed:
                raise UserError(
                    f"The sweep has no value for {', '.join(owed)} where {known}. The head of its file in sweeps/ "
                    "says how to find it, and how to give it."
                )

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook: keeps where the sweep goes and makes the launcher."""
        self.folder, self.loader = Path(config.hydra.sweep.dir), hydra_context.config_loader
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Take the grid apart into cells and launch them. Raises UserError, with every reason, before any work."""
        with mistakes_told():
            self.require_values(arguments)
            with composing():
                cells = self._cells(arguments)
            writable_folder(self.folder, "hydra.sweep.dir")
        OmegaConf.save(self.config, self.folder / "multirun.yaml")
        assert self.launcher is not None
        return [self.launcher.launch(cells, initial_job_idx=0)]

    @property
    def _written(self) -> list[dict[str, Any]]:
        """The grids with interpolations as they stand in the file."""
        assert self.config is not None
        node: Any = OmegaConf.to_container(self.config.hydra.sweeper, resolve=False)
        return _grids(node["params"], node["grids"])

    def _cells(self, arguments: Sequence[str]) -> list[list[str]]:
        """The overrides of every cell, each once though it may stand in two grids. Raises UserError where files of
        sweeps/ are what varies: their grids would not be run."""
        parser = OverridesParser.create(config_loader=self.loader)
        cells: dict[Any, list[str]] = {}
        for grid, written in zip(self.grids, self._written, strict=True):
            asked = parser.parse_overrides([*arguments])
            varied = {_setting(key) for key in grid}
            varied |= {each.key_or_group for each in asked if each.is_sweep_override()}
            given = [f"{key}={written[key] if _hangs_on(written[key], varied) else grid[key]}" for key in grid]
            overrides = parser.parse_overrides([*given, *arguments])
            if several := [o.input_line for o in overrides if o.key_or_group == "sweeps" and o.is_sweep_override()]:
                raise UserError(
                    f"{several[0]} would run a cell for each file, and none of their grids. Give one file, "
                    "and what else varies beside it, as in +sweeps=depth seed=0,1."
                )
            names = [f"{o.input_line} names no value" for o in overrides if _is_empty(o)]
            if names:
                raise UserError(f"The sweep has no cell: {', '.join(names)}. Give one at least.")
            for cell in BasicSweeper.split_arguments(overrides, None)[0]:
                cells.setdefault(frozenset(cell), cell)
        return list(cells.values())


def _grids(params: dict[str, Any] | None, grids: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    return [{**(params or {}), **grid} for grid in grids or [{}]]


def _setting(key: str) -> str:
    """The setting or group that an override is of: `speculation` of `+speculation@speculation`."""
    return key.lstrip("+~").partition("@")[0]


def _hangs_on(value: Any, varied: set[str]) -> bool:
    """Whether a value takes its own from one of these settings, or from a setting inside of one."""
    names = [name.split(".") for name in re.findall(r"\$\{([\w.]+)\}", str(value))]
    return any(".".join(parts[:end]) in varied for parts in names for end in range(1, len(parts) + 1))


def _is_empty(override: Override) -> bool:
    return override.is_sweep_override() and not list(override.sweep_string_iterator())


def install() -> None:
    """Make the sweeper known to Hydra, under the one namespace that it takes plugins from."""
    Plugins.instance().class_name_to_class["hydra_plugins.sddx.Grids"] = Grids
