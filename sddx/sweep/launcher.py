"""How Hydra's `--multirun` becomes a grid: a launcher that sees every cell before the first one starts."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from sddx.records import UserError
from sddx.sweep import cells as grid
from sddx.sweep.cells import Cell
from sddx.sweep.plan import Plan, describe

Check = Callable[[dict[str, Any]], None]
Look = Callable[[dict[str, Any]], Plan]


class Grid(Launcher):
    """Composes and checks all cells, prints what they will cost, runs them, and says what became of each.

    `check(config)` raises UserError for a cell that cannot run; `look(config)` says what it would build.
    """

    check: Check
    look: Look

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            cells = grid.compose(self._load, job_overrides, initial_job_idx)
            check_all(cells, type(self).check)
            describe([type(self).look(cell.config) for cell in cells])
        except UserError as error:
            print(f"\nerror: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if cells[0].config["dry_run"]:
            return []
        for cell in cells:
            grid.write(cell.folder, number=cell.number, name=cell.name, overrides=cell.overrides, state="waiting")
        returns = [self._run(cell) for cell in cells]
        conclude(cells)
        return returns

    def _load(self, overrides: list[str]) -> DictConfig:
        return self.context.config_loader.load_sweep_config(self.config, overrides)

    def _run(self, cell: Cell) -> JobReturn:
        """One cell in this process. What it raises, SystemExit too, ends in its own folder; the others go on."""
        folder, start = cell.folder, time.perf_counter()
        with grid.running(folder):
            try:
                found = run_job(self.task, cell.composed, "hydra.sweep.dir", "hydra.sweep.subdir", self.context)
                failure = None if found.status is JobStatus.COMPLETED else found._return_value
            except KeyboardInterrupt:
                grid.write(folder, state="interrupted", seconds=time.perf_counter() - start)
                raise
            except BaseException as error:
                failure = error
            finished(folder, failure, time.perf_counter() - start)
        gc.collect()
        return JobReturn(overrides=cell.overrides, status=JobStatus.COMPLETED)


def finished(folder: Any, failure: BaseException | None, seconds: float) -> None:
    """The end of a cell: its state, the reason and the traceback where it failed."""
    if failure is None:
        grid.write(folder, state="done", seconds=seconds)
        return
    (folder / grid.TRACEBACK).write_text("".join(traceback.format_exception(failure)))
    reason = str(failure).strip() or type(failure).__name__
    kind = "" if isinstance(failure, UserError) else f"{type(failure).__name__}: "
    grid.write(folder, state="failed", seconds=seconds, reason=f"{kind}{reason}")


def check_all(cells: Sequence[Cell], check: Check) -> None:
    """Raises one UserError with every mistake of every cell, each named once with the cells that make it."""
    mistakes: dict[str, list[str]] = {}
    for cell in cells:
        try:
            check(cell.config)
        except UserError as error:
            mistakes.setdefault(str(error), []).append(cell.name)
    if mistakes:
        wrong = len({name for names in mistakes.values() for name in names})
        listed = "\n".join(f"{_few(names)}: {mistake}" for mistake, names in mistakes.items())
        raise UserError(f"{wrong} of {len(cells)} cells cannot run; nothing was run.\n{listed}")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def conclude(cells: Sequence[Cell]) -> None:
    """Say how many cells failed and why; leaves with status 1 where any did."""
    records = {cell.name: grid.read(cell.folder) for cell in cells}
    failed = {name: record for name, record in records.items() if record["state"] != "done"}
    print(f"{len(cells) - len(failed)} of {len(cells)} cells are done.")
    for name, record in failed.items():
        print(f"  {name} {record['state']}: {record.get('reason', '').splitlines()[0]}")
    if failed:
        print(f"Tracebacks are in the cells' folders under {cells[0].folder.parent}; the same command goes on.")
        raise SystemExit(1)


def install(check: Check, look: Look) -> None:
    """Let this launcher stand in for Hydra's own, `hydra/launcher=basic`. May be called more than once.

    Hydra takes launchers from its own packages and from the namespace `hydra_plugins` alone.
    """
    Grid.check, Grid.look = staticmethod(check), staticmethod(look)
    basic = f"{BasicLauncher.__module__}.{BasicLauncher.__name__}"
    Plugins.instance().class_name_to_class[basic] = Grid
