"""W&B and CSV, fed by the same calls."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from sddx.errors import UserError
from sddx.store.digest import digest


@dataclass(frozen=True)
class Run:
    """The `run` settings: what this run is called."""

    name: str


class Tracker:
    """`log(row)` writes one flat row of metrics to `metrics.csv` (long form: step, name, value) and to W&B."""

    def __init__(self, table: Any, run: Any) -> None:
        self._table, self._run = table, run

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row of metrics to the table, one line a number, and to the W&B run."""
        values = {name: value for name, value in row.items() if name != "step"}
        for name, value in values.items():
            self._table.writerow([row.get("step", ""), name, value])
        if self._run is not None:
            self._run.log(dict(row))

    def summarise(self, flat: Mapping[str, Any]) -> None:
        """The run's final numbers, where W&B's own charts find them."""
        if self._run is not None:
            self._run.summary.update({name: value for name, value in flat.items() if value is not None})


@contextmanager
def track(
    folder: Path,
    identity: str,
    name: str,
    config: Mapping[str, Any],
    *,
    project: str,
    entity: str | None,
    group: str | None,
    tags: Sequence[str],
    mode: Literal["offline", "online", "disabled"],
) -> Iterator[Tracker]:
    """One W&B run and one `metrics.csv` in `folder`, finished with status 1 where the body raises.

    `identity` is the W&B id, derived from what was configured, so that a repeated run is the same run. Runs of
    one `group` stand together; a sweep gives its cells one. `mode` offline (nothing leaves the machine until
    `wandb sync`), online, or disabled (CSV alone). Tags may be numbers.
    """
    with (folder / "metrics.csv").open("w", newline="", buffering=1, encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["step", "name", "value"])
        run = None
        if mode != "disabled":
            run = _start(
                project=project,
                entity=entity,
                group=group,
                tags=_texts(tags),
                mode=mode,
                id=identity,
                name=name,
                dir=folder,
                config=dict(config),
            )
        try:
            yield Tracker(table, run)
        except BaseException:
            if run is not None:
                run.finish(exit_code=1)
            raise
        if run is not None:
            run.finish(exit_code=0)


def require(node: Mapping[str, Any]) -> None:
    """Raises UserError, before any work, where W&B would refuse the settings of the group `wandb`, or where it is
    online and knows no login. Of a tracker that is the user's own nothing is known."""
    if node["_target_"] != f"{__name__}.{track.__name__}" or node["mode"] == "disabled":
        return
    import wandb

    given = {"project": node["project"], "entity": node["entity"], "run_group": node["group"]}
    try:
        wandb.Settings(**given, run_tags=_texts(node["tags"]))
    except ValidationError as error:
        raise UserError(f"W&B refuses the settings of wandb: {error.errors()[0]['msg']}.") from None
    except wandb.errors.Error as error:
        raise UserError(f"W&B refuses the settings of wandb: {error}.") from None
    if node["mode"] == "online":
        require_login()


def require_login() -> None:
    """Raises UserError where W&B knows no login on this machine."""
    if reason := _no_login():
        raise UserError(
            f"W&B has no login here: {reason}. Run `wandb login`, or set WANDB_API_KEY; wandb.mode=offline needs "
            "none, and `wandb sync` uploads it later."
        )


@cache
def _no_login() -> str | None:
    """Why W&B cannot be logged in to; None where it can. Nobody is asked for a key."""
    import wandb

    try:
        return None if wandb.login(prompt=False, verify=False) else "no API key is configured"
    except wandb.errors.Error as error:
        return str(error).rstrip(".")


def _texts(tags: Sequence[Any]) -> list[str]:
    return [str(tag) for tag in tags]


def _start(**settings: Any) -> Any:
    """The W&B run of a training, whose curves are drawn over its steps."""
    run = open_run(**settings)
    run.define_metric("step", hidden=True)
    for family in ("train/*", "validation/*"):
        run.define_metric(family, step_metric="step")
    return run


def open_run(**settings: Any) -> Any:
    """A quiet W&B run; `resume` makes a repeated run the same run, `reinit` keeps runs of one process apart."""
    import wandb

    quiet = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
    return wandb.init(**settings, resume="allow", reinit="create_new", settings=quiet)


def mark(store: Path, *what: Any) -> Path:
    """The file of a store that is there when W&B has seen this, and is touched when it has."""
    folder = store / ".tracked"
    folder.mkdir(exist_ok=True)
    return folder / digest(list(what))
