"""Several grids in one sweep: the blocks times the arms, then the sizes times the arms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins


class Grids(BasicSweeper):
    """Hydra's sweeper over each of `grids` in turn, all cells in one launch. A grid is written as its `params`
    are, which hold in every grid; the command line beats both."""

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
        grids: Sequence[dict[str, str]] = (),
    ) -> None:
        super().__init__(max_batch_size, params)
        self.grids = list(grids) or [{}]

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        cells: dict[Any, list[str]] = {}
        for grid in self.grids:
            own = parser.parse_overrides([f"{key}={values}" for key, values in grid.items()])
            for cell in BasicSweeper.split_arguments([*own, *overrides], None)[0]:
                cells.setdefault(frozenset(cell), cell)  # the command line can make two grids the same
        return [list(cells.values())]


def install() -> None:
    """Make the sweeper known to Hydra, under the one namespace that it takes plugins from."""
    Plugins.instance().class_name_to_class["hydra_plugins.sddx.Grids"] = Grids
