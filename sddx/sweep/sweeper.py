"""Several grids in one sweep: the blocks times the arms, then the sizes times the arms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from sddx.entry import mistakes_told
from sddx.records import UserError


class Grids(Sweeper):
    """The product of `params`, as Hydra's own sweeper makes it, or of each of `grids` in turn, which are written
    alike and which `params` holds for too. The command line beats both. All cells go to the launcher at once."""

    def __init__(self, *, params: dict[str, str] | None, grids: Sequence[dict[str, str]]) -> None:
        self.grids = [{**(params or {}), **grid} for grid in grids or [{}]]

    def require_values(self, arguments: Sequence[str]) -> None:
        """Raises UserError where a grid waits for a value that only another sweep can tell."""
        given = {argument.partition("=")[0] for argument in arguments}
        for grid in self.grids:
            owed = [name for name, values in grid.items() if values is None and name not in given]
            known = ", ".join(f"{name}={values}" for name, values in grid.items() if values is not None)
            if owed:
                raise UserError(
                    f"The sweep has no value for {', '.join(owed)} where {known}. The head of its file in sweeps/ "
                    "says how to find it, and how to give it."
                )

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.folder, self.loader = Path(config.hydra.sweep.dir), hydra_context.config_loader
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        with mistakes_told():
            self.require_values(arguments)
        parser = OverridesParser.create(config_loader=self.loader)
        cells: dict[Any, list[str]] = {}
        for grid in self.grids:
            overrides = parser.parse_overrides([*(f"{key}={values}" for key, values in grid.items()), *arguments])
            for cell in BasicSweeper.split_arguments(overrides, None)[0]:
                cells.setdefault(frozenset(cell), cell)  # a cell may stand in two grids
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.folder / "multirun.yaml")
        assert self.launcher is not None
        return [self.launcher.launch(list(cells.values()), initial_job_idx=0)]


def install() -> None:
    """Make the sweeper known to Hydra, under the one namespace that it takes plugins from."""
    Plugins.instance().class_name_to_class["hydra_plugins.sddx.Grids"] = Grids
