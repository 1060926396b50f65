"""How Hydra's `--multirun` becomes a grid: a launcher that sees every cell before the first one starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from sddx.config import bound, raise_for
from sddx.config.entry import mistakes_told
from sddx.config.shared import sharing
from sddx.errors import UserError, mistakes_of
from sddx.store.digest import digest
from sddx.sweep import cells as grid
from sddx.sweep.cells import Cell
from sddx.sweep.engines import Engine, in_process
from sddx.sweep.loading import Loader
from sddx.sweep.plan import levels

ENGINE = "hydra.launcher.engine"
Check = Callable[[dict[str, Any]], None]
Look = Callable[[dict[str, Any]], Any]
Tell = Callable[[Sequence[Any], Sequence[dict[str, Any]]], None]


class Grid(Launcher):
    """Composes and checks all cells, prints what they will cost, lets the engine run them, and says what became
    of each.

    `first(config)` raises UserError for a cell that cannot run, and downloads nothing; `check(config)` is then
    asked of the cells of which `owes(config)` holds, whose models are still to be downloaded; `look(config)` says
    what a cell would build (a Plan), and `tell` prints that for all; `task` is the path of the function that runs
    one, `task(config, folder)`, and `report(folder, config)` says what the cells found, `config` being that of
    the first. Without a task nothing is run.
    """

    first: Check
    check: Check
    owes: Callable[[dict[str, Any]], bool]
    look: Look
    tell: Tell
    task: str | None
    report: Callable[[Path, dict[str, Any]], None]

    def __init__(self, engine: Engine = in_process) -> None:
        self.engine = engine

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook: keeps its context and the configuration."""
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose, check and plan all cells, then let the engine run them; returns Hydra's records of them. Raises
        UserError before any work where a cell is wrong."""
        with mistakes_told():
            self._check_engine()
            with sharing():
                cells = grid.compose(self._loader(), job_overrides, initial_job_idx)
                plans = self._plans(cells)
            task = type(self).task
            if cells[0].config["dry_run"] or task is None:
                return []
            grid.claim(cells)
            self.engine([[cells[at].folder for at in level] for level in levels(plans)], task)
        type(self).report(cells[0].folder.parent, cells[0].config)
        conclude(cells)
        return [JobReturn(overrides=cell.overrides, status=JobStatus.COMPLETED) for cell in cells]

    def _check_engine(self) -> None:
        """Raises UserError where its settings are wrong, which would come out when all jobs are queued."""
        if not callable(self.engine):
            raise UserError(f"hydra.launcher.engine={self.engine} runs nothing. Choose hydra/launcher=basic.")
        if node := OmegaConf.select(self.config, ENGINE):
            asked: Any = OmegaConf.to_container(node)
            settings = {key: value for key, value in asked.items() if key[0] != "_"}
            raise_for([*bound(ENGINE, settings, type(self.engine))])

    def _plans(self, cells: Sequence[Cell]) -> list[Any]:
        """What the cells would build, once all are found sound, told to the user."""
        check_all(cells, type(self).first)
        check_all([cell for cell in cells if type(self).owes(cell.config)], type(self).check)
        plans = [type(self).look(cell.config) for cell in cells]
        type(self).tell(plans, [cell.config for cell in cells])
        return plans

    def _loader(self) -> Loader:
        return Loader(self.context.config_loader, self.config)


def check_all(cells: Sequence[Cell], check: Check) -> None:
    """Raises one UserError with every mistake of every cell, each named once with the cells that make it. Cells
    that differ in their names and seeds alone are checked as one."""
    alike: dict[str, list[Cell]] = {}
    for cell in cells:
        alike.setdefault(_checked(cell.config), []).append(cell)
    mistakes: dict[str, list[str]] = {}
    for same in alike.values():
        for mistake in mistakes_of([partial(check, same[0].config)]):
            mistakes.setdefault(str(mistake), []).extend(cell.name for cell in same)
    if mistakes:
        wrong = len({name for names in mistakes.values() for name in names})
        listed = "\n".join(f"{_few(names)}: {mistake}" for mistake, names in mistakes.items())
        raise UserError(f"{wrong} of {len(cells)} cells cannot run; nothing was run.\n{listed}")


def _checked(config: dict[str, Any]) -> str:
    """A digest of all in a configuration that a check can find wrong: one sound seed is as good as another."""
    seed = config.get("seed")
    sound = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**31
    idle = {"run", *(("seed",) if sound else ())}
    parts = {**config, "choices": {key: value for key, value in config["choices"].items() if key not in idle}}
    return digest({key: value for key, value in parts.items() if key not in idle})


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def conclude(cells: Sequence[Cell]) -> None:
    """Say how many cells failed and why; leaves with status 1 where any did."""
    failed = [(cell, state) for cell in cells if (state := grid.state(cell.folder)) != "done"]
    print(f"{len(cells) - len(failed)} of {len(cells)} cells are done.")
    for cell, state in failed:
        reason = grid.read(cell.folder).get("reason", "its process ended without a word")
        print(f"  {cell.name} {state}: {reason.splitlines()[0]}")
    if failed:
        print(f"Tracebacks are in the cells' folders under {cells[0].folder.parent}; the same command goes on.")
        raise SystemExit(1)


def install(
    check: Check,
    look: Look,
    tell: Tell,
    task: str | None = None,
    first: Check | None = None,
    owes: Callable[[dict[str, Any]], bool] = lambda config: False,
    report: Callable[[Path, dict[str, Any]], None] = lambda folder, config: None,
) -> None:
    """Let this launcher stand behind every `hydra/launcher=` of ours, and in for Hydra's own, `basic`. May be
    called more than once.

    Hydra takes launchers from its own packages and from the namespace `hydra_plugins` alone, hence the names.
    """
    Grid.first, Grid.check, Grid.owes = staticmethod(first or check), staticmethod(check), staticmethod(owes)
    Grid.look, Grid.tell, Grid.task = staticmethod(look), staticmethod(tell), task
    Grid.report = staticmethod(report)
    for name in ("hydra_plugins.sddx.Grid", "hydra._internal.core_plugins.basic_launcher.BasicLauncher"):
        Plugins.instance().class_name_to_class[name] = Grid
