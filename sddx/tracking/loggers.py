"""The loggers of the group `logger`: Lightning's own, for runs of several stages and for the report of a sweep.

A function makes one for a run (`Tracked`) from its settings. Beside metrics, each shows of a report what it can.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from hydra.utils import get_object
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pydantic import ValidationError

from sddx.config.build import Settings
from sddx.errors import UserError
from sddx.files import lock
from sddx.files.naming import file_name
from sddx.store.digest import digest
from sddx.tracking import Tracked, numbers

Curves = Mapping[str, Sequence[tuple[float, float]]]  # by arm


class Shows:
    """What a logger of ours shows of a report beside scalars: here nothing. `local`: what it logs stands in the
    run's own folder, and not among runs that it knows from elsewhere."""

    local = False

    def axis(self, name: str, over: str) -> None:
        """Scalars under `over` are drawn over the scalar `name`."""

    def plot(self, name: str, axis: str, curves: Curves, drawn: Callable[[], Any]) -> None:
        """One measure by arm; `drawn` gives a figure of matplotlib's."""

    def figure(self, name: str, svg: str) -> None:
        """A drawing."""

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of texts."""

    def pages(self, paths: Sequence[Path]) -> None:
        """The report itself: report.html, report.md, report.csv."""


class Wandb(WandbLogger, Shows):
    """A quiet W&B run that a repeated run goes on with, apart from others of this process. A training is drawn over
    its rows' `step`, a report over its axes."""

    def __init__(self, tracked: Tracked, **settings: Any) -> None:
        super().__init__(name=tracked.name, save_dir=tracked.folder, version=tracked.identity, **settings)
        self._of_run = tracked.job == "run"
        self._experiment: Any = None  # begun when the first word is said

    @property
    def experiment(self) -> Any:
        """W&B's own run, begun when it is first asked for."""
        if self._experiment is None:
            self._experiment = self._begun()
        return self._experiment

    def _begun(self) -> Any:
        import wandb

        quiet = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
        arguments = {name: value for name, value in self._wandb_init.items() if name != "anonymous"}
        run = wandb.init(**arguments, reinit="create_new", settings=quiet)
        if self._of_run:
            run.define_metric("step", hidden=True)
            for family in ("train/*", "validation/*"):
                run.define_metric(family, step_metric="step")
        return run

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """A row of history, with its `step` as one of its values."""
        at = {"step": step} if self._of_run and step is not None else {}
        self.experiment.log({**at, **metrics})

    def conclude(self, results: Mapping[str, Any]) -> None:
        """A run's final numbers and words, where W&B's own charts find them."""
        self.experiment.summary.update({name: value for name, value in results.items() if value is not None})

    def finalize(self, status: str) -> None:
        """Ends the run, with status 1 where it failed."""
        self.experiment.finish(exit_code=0 if status == "success" else 1)

    def axis(self, name: str, over: str) -> None:
        """A scalar that is an axis, and what is drawn over it."""
        self.experiment.define_metric(name, hidden=True)
        self.experiment.define_metric(f"{over}/*", step_metric=name)

    def plot(self, name: str, axis: str, curves: Curves, drawn: Callable[[], Any]) -> None:
        """A line plot of W&B's."""
        from wandb.plot import line_series

        over, _, measure = name.rpartition("/")
        xs, ys = ([[point[side] for point in points] for points in curves.values()] for side in (0, 1))
        self.experiment.log({f"plots/{name}": line_series(xs, ys, list(curves), f"{measure} over {over}", axis)})

    def figure(self, name: str, svg: str) -> None:
        """The drawing as HTML."""
        import wandb

        self.experiment.log({f"figures/{name}": wandb.Html(svg)})

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of W&B's."""
        self.log_table(f"tables/{name}", columns=list(header), data=[list(row) for row in rows])

    def pages(self, paths: Sequence[Path]) -> None:
        """The pages as one artifact."""
        import wandb

        pages = wandb.Artifact(f"report-{self._id}", type="report")
        for path in paths:
            pages.add_file(str(path))
        self.experiment.log_artifact(pages)


class Csv(CSVLogger, Shows):
    """Rows on disk as soon as they are there. What has no step stands at 0."""

    local = True

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """A row of the table."""
        super().log_metrics(dict(metrics), step or 0)


class TensorBoard(TensorBoardLogger, Shows):
    """A run's final numbers stand beside its settings (HPARAMS); of a report the curves are scalars and images, its
    tables and its page texts."""

    local = True

    def conclude(self, results: Mapping[str, Any]) -> None:
        """A run's final numbers, beside its settings."""
        self.log_hyperparams(self.hparams, numbers(results))

    def plot(self, name: str, axis: str, curves: Curves, drawn: Callable[[], Any]) -> None:
        """The figure as an image."""
        self.experiment.add_figure(f"plots/{name}", drawn())

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The table as a text in Markdown."""
        lines = [header, ["---"] * len(header), *rows]
        text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        self.experiment.add_text(f"tables/{name}", text)

    def pages(self, paths: Sequence[Path]) -> None:
        """The page in Markdown as a text."""
        for path in (path for path in paths if path.suffix == ".md"):
            self.experiment.add_text(path.stem, path.read_text(encoding="utf-8"))


class MLflow(MLFlowLogger, Shows):
    """A run of an MLflow experiment, found again by its tag `sddx.identity`."""

    def log_hyperparams(self, params: Any) -> None:
        """Settings under names that MLflow takes, as it has them from an earlier attempt."""
        known = self.experiment.get_run(self.run_id).data.params  # which MLflow never lets change
        named = {_plain(name): value for name, value in params.items()}
        super().log_hyperparams({name: value for name, value in named.items() if name not in known})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Metrics under names that MLflow takes."""
        super().log_metrics({_plain(name): value for name, value in metrics.items()}, step)

    def figure(self, name: str, svg: str) -> None:
        """The drawing as an artifact of the run."""
        self.experiment.log_text(self.run_id, svg, f"figures/{file_name(name)}.svg")

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The table as an artifact, in the form that MLflow shows as a table."""
        table = {"columns": list(header), "data": [list(row) for row in rows]}
        self.experiment.log_text(self.run_id, json.dumps(table), f"tables/{file_name(name)}.json")

    def pages(self, paths: Sequence[Path]) -> None:
        """The pages as artifacts of the run."""
        for path in paths:
            self.experiment.log_artifact(self.run_id, str(path))


def _plain(name: str) -> str:
    """A name of the characters that MLflow takes."""
    return re.sub(r"[^\w/. -]+", "_", name)


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
    job = None if tracked.job == "run" else tracked.job
    options = {"entity": entity, "group": group, "tags": _texts(tags), "mode": mode, "job_type": job}
    return Wandb(tracked, project=project, **options)


def csv(tracked: Tracked) -> Csv:
    """`csv/metrics.csv` in the run's folder, in wide form."""
    return Csv(tracked.folder, name="csv", version="", flush_logs_every_n_steps=1)


def tensorboard(tracked: Tracked) -> TensorBoard:
    """`tensorboard/` in the run's folder. What an earlier attempt logged there is not shown."""
    return TensorBoard(tracked.folder, name="tensorboard", version="", default_hp_metric=False, purge_step=0)


def mlflow(tracked: Tracked, *, uri: str | None, experiment: str, group: str | None, tags: Sequence[str]) -> MLflow:
    """A run of this experiment on the server or in the database at `uri` (None: mlflow.db here), with `group` and
    each of `tags` as tags. Raises UserError where MLflow cannot be used there."""
    from mlflow.exceptions import MlflowException

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
    with lock.hold(Path(tempfile.gettempdir()) / f"sddx-mlflow-{digest(uri)[:16]}.lock"):
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
    import wandb

    if node["mode"] == "disabled":
        return
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
