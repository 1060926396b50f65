"""What is logged of a run while it runs: `metrics.csv` in its folder, and any Lightning loggers, fed by the same
calls."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_object

from sddx.config.build import Settings, build
from sddx.errors import UserError
from sddx.store.digest import digest
from sddx.tracking.loggers import REQUIRED, require_logger, wandb
from sddx.tracking.shows import Shows
from sddx.tracking.tracked import Tracked, numbers

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


@dataclass(frozen=True)
class Run:
    """The `run` settings: what this run is called."""

    name: str


track = wandb  # as files of older versions call it


class Tracker:
    """`log(row)` writes one flat row of metrics to `metrics.csv` (long form: step, name, value) and to loggers."""

    def __init__(self, table: Any, loggers: Sequence[Logger]) -> None:
        self._table, self._loggers, self._step = table, loggers, 0

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row of metrics to the table, one line a number, and to every logger what of it is a number."""
        values = {name: value for name, value in row.items() if name != "step"}
        self._step = row.get("step", self._step)
        for name, value in values.items():
            self._table.writerow([row.get("step", ""), name, value])
        for logger in self._loggers:
            logger.log_metrics(numbers(values), step=row.get("step"))

    def summarise(self, flat: Mapping[str, Any]) -> None:
        """The run's final numbers, where each logger's own charts find them."""
        for logger in self._loggers:
            if conclude := getattr(logger, "conclude", None):
                conclude(flat)
            else:
                logger.log_metrics(numbers(flat), step=self._step)


@contextmanager
def open_tracker(folder: Path, settings: Mapping[str, Any], loggers: Sequence[Logger]) -> Iterator[Tracker]:
    """`metrics.csv` in a run's folder, and its `settings` and metrics in these loggers, which are finished as
    failed where the body raises."""
    with (folder / "metrics.csv").open("w", newline="", buffering=1, encoding="utf-8") as file, finished(loggers):
        table = csv.writer(file)
        table.writerow(["step", "name", "value"])
        for logger in loggers:
            logger.log_hyperparams(dict(settings))
        yield Tracker(table, loggers)


@contextmanager
def finished(loggers: Sequence[Logger]) -> Iterator[None]:
    """Finishes these loggers with the body, as failed where it raises."""
    status = "failed"
    try:
        yield
        status = "success"
    finally:
        for logger in loggers:
            logger.finalize(status)


def made(nodes: Mapping[str, Settings], tracked: Tracked, seen: Collection[str] = ()) -> dict[str, Logger]:
    """The loggers of the group `logger` for one run, without those that are switched off, and of those that have
    `seen` the run already the ones alone that log into its own folder. Raises UserError where one is none."""
    by_name = {name: _made(name, node, tracked) for name, node in nodes.items()}
    return {
        name: logger
        for name, logger in by_name.items()
        if logger is not None and (name not in seen or getattr(logger, "local", False))
    }


def _made(name: str, node: Settings, tracked: Tracked) -> Logger | None:
    """A node with `_partial_` is called with what it is to log; one without is a Lightning logger as it is."""
    logger = build(node)(tracked) if node.get("_partial_") else build(node)
    if logger is not None and not _is_logger(logger):
        raise UserError(
            f"logger.{name}._target_={node['_target_']} makes a {type(logger).__name__}, and a logger of "
            "Lightning's is needed (lightning.pytorch.loggers)."
        )
    return logger


def _is_logger(made: Any) -> bool:
    """Whether this is one of ours, or of Lightning's, which is not imported for ours."""
    if isinstance(made, Shows):
        return True
    from lightning.pytorch.loggers import Logger

    return isinstance(made, Logger)


def require(nodes: Mapping[str, Settings]) -> None:
    """Raises UserError, before any work, where a logger lacks its library, cannot be called as it will be, or where
    W&B would refuse its settings or knows no login. Of the settings of a logger of the user's own nothing is
    known."""
    for name, node in nodes.items():
        REQUIRED.get(get_object(node["_target_"]), require_logger)(name, node)


def mark(store: Path, *what: Any) -> Path:
    """The file of a store that is there when a logger has seen this, and is touched when it has."""
    folder = store / ".tracked"
    folder.mkdir(exist_ok=True)
    return folder / digest(list(what))
