"""The cells of a grid: what each runs, what it is called, and what became of it, on disk."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sddx.config import resolve, writable_folder
from sddx.errors import UserError
from sddx.files import lock
from sddx.files.naming import file_name, shortened
from sddx.files.shapes import Form, read_json
from sddx.gguf.located import located
from sddx.run_folder import CONFIG, LOCK, holds_another, is_another
from sddx.store import manifest
from sddx.store.digest import digest

RECORD, TRACEBACK, PROGRESS = "cell.json", "traceback.txt", "progress.json"
log = logging.getLogger(__name__)
VALUE, GROUP = 40, 120  # bytes of a value in a cell's name, and of a W&B group, of which W&B takes 128
# How a setting that varies is written into a cell's name; any other as `key=value`.
SHORT: dict[str, Callable[[str], str]] = {
    "pruning.remove": lambda value: f"{value}out",
    "dataset.size": lambda value: f"{int(value) / 1000:g}k" if value.isdigit() else value,
    "tuning.rank": lambda value: f"r{value}",
    "seed": lambda value: f"s{value}",
}


class Record(Form):
    """What becomes of a cell, as far as it is known."""

    number: int = 0
    name: str = ""
    overrides: list[str] = []
    launcher: str = ""
    state: Literal["waiting", "running", "done", "failed", "interrupted"] = "waiting"
    started: float = 0
    seconds: float = 0
    reason: str = ""


class Complete(Record):
    """The record of a cell that a sweep wrote down."""

    number: int
    name: str
    launcher: str


class Progress(Form):
    """Where a running cell is: see `show`."""

    what: str
    done: float
    total: float | None
    rate: float | None


@dataclass(frozen=True)
class Cell:
    """One run of a grid: Hydra's composed configuration, and the same as plain values."""

    number: int
    overrides: tuple[str, ...]
    composed: DictConfig
    config: dict[str, Any]
    folder: Path  # below that of its sweep

    @property
    def name(self) -> str:
        """The run's name, made of what varies."""
        return self.config["run"]["name"]


def compose(load: Callable[[list[str]], DictConfig], overrides: Sequence[Sequence[str]], first: int) -> list[Cell]:
    """Every cell of a grid, named for what varies in it: `3out-sdd-8k-s0`.

    `load` composes Hydra's configuration of one cell. Raises UserError where two cells would have one name or one
    folder.
    """
    composed = [load(list(arguments)) for arguments in overrides]
    given = [_by_name(arguments) for arguments in overrides]
    parts = varying(given)
    settings = digest([OmegaConf.to_container(_settings(each)) for each in composed])
    group = shortened("-".join([*(part.split(".")[-1] for part in parts), settings[:8]]), GROUP)
    named = zip(composed, overrides, [_name(each, parts) for each in given], strict=True)
    cells = [_cell(number, *each, group) for number, each in enumerate(named, start=first)]
    if doubled := _doubled(cell.name for cell in cells):
        raise UserError(
            f"Several cells of the sweep have one name: {', '.join(doubled)}. Leave run.name to sddx, or make it "
            "of what varies; a cell that is there twice must be taken out."
        )
    if doubled := _doubled(cell.folder.name for cell in cells):
        raise UserError(
            f"Several cells of the sweep have one folder: {', '.join(doubled)}. Leave hydra.sweep.subdir to sddx, "
            "or make it of hydra.job.num."
        )
    return cells


def _doubled(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def claim(cells: Sequence[Cell]) -> None:
    """Write down all cells of a sweep, in folders that are no other sweep's, also where two begin in one second.
    Raises UserError."""
    sweep = writable_folder(cells[0].folder.parent, "hydra.sweep.dir")
    with lock.hold(sweep / LOCK):
        require_vacant(cells)
        for cell in cells:
            prepare(cell)


def require_vacant(cells: Sequence[Cell]) -> None:
    """Raises UserError where the folder of a cell holds results of other settings, or another process is at work
    there on them, or is to be."""
    held = [cell.folder for cell in cells if holds_another(cell.folder, cell.config)]
    begun = [cell for cell in cells if is_cell(cell.folder) and state(cell.folder) in ("running", "waiting")]
    held += [cell.folder for cell in begun if is_another(cell.folder, cell.config)]
    if held:
        names = ", ".join(dict.fromkeys(folder.name for folder in held))
        raise UserError(
            f"{held[0].parent} is another sweep's: {names} there are runs of other settings. Give another folder "
            "with hydra.sweep.dir=..., or move that one away."
        )


def _by_name(overrides: Sequence[str]) -> dict[str, str]:
    """The overrides of a cell by name, without Hydra's signs for adding."""
    return dict(override.lstrip("+").partition("=")[::2] for override in overrides)


def _cell(number: int, composed: DictConfig, overrides: Sequence[str], name: str | None, group: str) -> Cell:
    """The cell of this number, under this name, and in this W&B group, unless the user gave others."""
    with open_dict(composed):
        composed.hydra.job.id = composed.hydra.job.num = number
        HydraConfig.instance().set_config(composed)  # what is interpolated may name Hydra's settings of this cell
        if name:
            composed.run.name = name
        with suppress(OmegaConfBaseException):  # what it names is not there, as `resolve` says
            composed.wandb.group = composed.wandb.group or group
    config, sweep = located(resolve(_settings(composed))), composed.hydra.sweep
    folder = (Path(sweep.dir) / file_name(str(sweep.subdir))).absolute()
    return Cell(number, tuple(overrides), composed, config, folder)


def _settings(composed: DictConfig) -> DictConfig:
    """All but Hydra's own."""
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def varying(given: Sequence[dict[str, str]]) -> list[str]:
    """The groups and settings that the overrides of cells, by name, give different values."""
    keys = dict.fromkeys(key for each in given for key in each)
    return sorted([key for key in keys if len({each.get(key) for each in given}) > 1], key=_place)


def _place(part: str) -> tuple[int, str]:
    known = ["model", "pruning.remove", "pruning", "loss", "dataset", "dataset.size", "tuning", "tuning.rank"]
    return (99 if part == "seed" else known.index(part) if part in known else 50, part)


def _name(given: dict[str, str], parts: Sequence[str]) -> str | None:
    """What a cell is called by what varies; nothing where the user names it, or its grid gives it none of that."""
    if "run.name" in given:
        return None
    return "-".join(_short(part, given[part]) for part in parts if part in given) or None


def _short(key: str, value: str) -> str:
    """`3out`, `8k`, `s0`; the option of a group as it is; any other setting with the last part of its name."""
    plain = shortened(value.replace("/", "_"), VALUE)
    if key in SHORT:
        return SHORT[key](plain)
    return plain if "." not in key else f"{key.split('.')[-1]}={plain}"


def prepare(cell: Cell) -> None:
    """Write down a cell that is to run: its record and its configuration, all that a worker needs. What an earlier
    attempt came to is forgotten; one that another process runs is left to it."""
    if state(cell.folder) == "running":
        return
    cell.folder.mkdir(parents=True, exist_ok=True)
    for name in (RECORD, PROGRESS, TRACEBACK):
        (cell.folder / name).unlink(missing_ok=True)
    OmegaConf.save(OmegaConf.create(cell.config), cell.folder / CONFIG)
    launcher = cell.composed.hydra.runtime.choices["hydra/launcher"]
    about = {"number": cell.number, "name": cell.name, "overrides": cell.overrides, "launcher": launcher}
    write(cell.folder, **about, state="waiting")


def write(folder: Path, **fields: Any) -> None:
    """Add to a cell's record, which is complete at every moment."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest.replace_text(folder / RECORD, json.dumps(read(folder) | fields, indent=1) + "\n")


def show(folder: Path, progress: dict[str, Any]) -> None:
    """Note where a running cell is: `what` it does, `done` of `total`, and at which `rate` (a second)."""
    manifest.replace_text(folder / PROGRESS, json.dumps(progress))


def progress(folder: Path) -> dict[str, Any]:
    """What `show` noted last; empty where nothing was, or it is damaged."""
    with suppress(UserError):
        return read_json(folder / PROGRESS, Progress)
    return {}


def read(folder: Path) -> dict[str, Any]:
    """A cell's record; empty where there is none, or it is damaged."""
    with suppress(UserError):
        return read_json(folder / RECORD, Record)
    return {}


def look(folder: Path) -> dict[str, Any]:
    """The whole record of a cell, with its `state` as it is now. Raises UserError where it is damaged."""
    return read_json(folder / RECORD, Complete) | {"state": state(folder)}


def is_cell(folder: Path) -> bool:
    """Whether a run folder is that of a sweep's cell."""
    return (folder / RECORD).is_file()


def state(folder: Path) -> str:
    """waiting, running, done, failed, interrupted; or killed: it began, has no end, and nobody holds its lock."""
    recorded = read(folder).get("state", "waiting")
    if recorded != "running" or lock.is_held(folder / LOCK):
        return recorded
    recorded = read(folder).get("state", "waiting")  # it may have ended since
    return "killed" if recorded == "running" else recorded


@contextmanager
def running(folder: Path) -> Iterator[bool]:
    """Marks a cell as running by this process, as long as the body runs or the process lives; unless it has ended,
    done or failed, which the body is told. Where the lock is lost that is said and no more: what the cell builds
    has locks of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock.hold(folder / LOCK, lost=log.warning):
        if not (has_ended := read(folder).get("state") in ("done", "failed")):
            (folder / PROGRESS).unlink(missing_ok=True)
            write(folder, state="running", started=time.time(), process=os.getpid(), host=socket.gethostname())
        yield has_ended
