"""The loggers of the group `logger`, for runs of several stages and for the report of a sweep.

A function makes one for a run (`Tracked`) from its settings. Beside metrics, each shows of a report what it can.
Importing this module is cheap; what a logger needs is imported where one is made.
"""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.utils import get_object
from pydantic import ValidationError

from sddx.config.build import Settings
from sddx.errors import UserError
from sddx.files import lock
from sddx.store.digest import digest
from sddx.tracking.tracked import Tracked

if TYPE_CHECKING:
    from sddx.tracking.of_lightning import Csv, MLflow, TensorBoard
    from sddx.tracking.wandb_run import Wandb


def wandb(
    tracked: Tracked,
    *,
    project: str,
    entity: str | None,
    group: str | None,
    tags: Sequence[str],
    mode: Literal["offline", "online", "disabled"],
) -> Wandb | None:
    """W&B. Runs of one `group` stand together; a sweep gives its cells one. `mode` offline (nothing leaves the
    machine until `wandb sync`), online, or disabled (no logger). Tags may be numbers."""
    if mode == "disabled":
        return None
    from sddx.tracking.wandb_run import Wandb

    job = None if tracked.job == "run" else tracked.job
    options = {"entity": entity, "group": group, "tags": _texts(tags), "mode": mode, "job_type": job}
    return Wandb(tracked, project=project, **options)


def csv(tracked: Tracked) -> Csv:
    """`csv/metrics.csv` in the run's folder, in wide form."""
    from sddx.tracking.of_lightning import Csv

    return Csv(tracked.folder, name="csv", version="", flush_logs_every_n_steps=1)


def tensorboard(tracked: Tracked) -> TensorBoard:
    """`tensorboard/` in the run's folder. What an earlier attempt logged there is not shown."""
    from sddx.tracking.of_lightning import TensorBoard

    return TensorBoard(tracked.folder, name="tensorboard", version="", default_hp_metric=False, purge_step=0)


def mlflow(tracked: Tracked, *, uri: str | None, experiment: str, group: str | None, tags: Sequence[str]) -> MLflow:
    """A run of this experiment on the server or in the database at `uri` (None: mlflow.db here), with `group` and
    each of `tags` as tags. Raises UserError where MLflow cannot be used there."""
    from mlflow.exceptions import MlflowException

    from sddx.tracking.of_lightning import MLflow

    named = {"sddx.identity": tracked.identity, "sddx.job": tracked.job, **({"group": group} if group else {})}
    tagged = {**dict.fromkeys(_texts(tags), "true"), **named}
    uri = uri or f"sqlite:///{Path('mlflow.db').absolute()}"
    try:
        known = _known_run(uri, experiment, tracked.identity)
        return MLflow(experiment, run_name=tracked.name, tracking_uri=uri, tags=tagged, run_id=known)
    except MlflowException as error:
        raise UserError(f"MLflow cannot be used at {uri}: {str(error).splitlines()[0]}") from error


def _known_run(uri: str, experiment: str, identity: str) -> str | None:
    """The run that this one repeats, of an experiment that is made where it is not there. Cells of a sweep that
    begin at one time on one machine make one of it."""
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    ours = f"sddx-mlflow-{os.getuid()}-{digest(uri)[:16]}.lock"  # another user's cannot be opened
    with lock.hold(Path(tempfile.gettempdir()) / ours):
        client = MlflowClient(uri)
        known = client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else client.create_experiment(experiment, _artifacts(uri))
    runs = client.search_runs([number], f"tags.`sddx.identity` = '{identity}'", max_results=1)
    return runs[0].info.run_id if runs else None


def _artifacts(uri: str) -> str | None:
    """Where an experiment's artifacts go: beside its database on this machine; None: where its server puts them."""
    _, local, path = uri.partition("sqlite:///")
    return Path(path).absolute().with_name("mlruns").as_uri() if local else None


def _texts(tags: Sequence[Any]) -> list[str]:
    return [str(tag) for tag in tags]


def require_logger(name: str, node: Settings) -> None:
    """Raises UserError for a node that makes no logger of Lightning's and cannot be called to make one."""
    from lightning.pytorch.loggers import Logger

    target = get_object(node["_target_"])
    if not node.get("_partial_"):
        if not (inspect.isclass(target) and issubclass(target, Logger)):
            raise UserError(
                f"logger.{name}._target_={node['_target_']} is no logger of Lightning's. Name one of its classes, "
                "or set _partial_=true for a function that makes one of what it is to log (sddx.tracking.Tracked)."
            )
        return
    settings = {key: value for key, value in node.items() if not key.startswith("_")}
    try:
        inspect.signature(target).bind(None, **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"logger.{name}._target_: {node['_target_']} is called with 1 value ({error}).") from None


def require_tensorboard(name: str, node: Settings) -> None:
    """Raises UserError where TensorBoard is not installed."""
    _require_libraries("tensorboard", ["tensorboard"])


def require_mlflow(name: str, node: Settings) -> None:
    """Raises UserError where MLflow, or what it writes a database on this machine with, is not installed."""
    local = not node["uri"] or node["uri"].startswith("sqlite:")
    _require_libraries("mlflow", ["mlflow", *(["sqlalchemy", "alembic"] if local else [])])


def _require_libraries(logger: str, libraries: Sequence[str]) -> None:
    if lacking := [library for library in libraries if find_spec(library) is None]:
        raise UserError(f"logger={logger} needs {', '.join(lacking)}: pip install 'sddx[{logger}]'.")


def require_wandb(name: str, node: Settings) -> None:
    """Raises UserError where W&B would refuse its settings, or where it is online and knows no login."""
    if node["mode"] == "disabled":
        return
    import wandb

    settings = {"project": node["project"], "entity": node["entity"], "run_group": node["group"]}
    try:
        wandb.Settings(**settings, run_tags=_texts(node["tags"]))
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


# What is asked before work, by the function that makes a logger: of its name in the group, and its node.
REQUIRED: dict[Any, Callable[[str, Settings], None]] = {
    wandb: require_wandb,
    csv: lambda name, node: None,
    tensorboard: require_tensorboard,
    mlflow: require_mlflow,
}
