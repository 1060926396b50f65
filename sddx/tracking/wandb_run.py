"""W&B's runs. Lightning's logger for them is not built upon: it takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sddx.tracking.shows import Curves, Shows
from sddx.tracking.tracked import Tracked


class Wandb(Shows):
    """A quiet W&B run that a repeated run goes on with, apart from others of this process. A training is drawn over
    its rows' `step`, a report over its axes."""

    def __init__(self, tracked: Tracked, **settings: Any) -> None:
        about = {"name": tracked.name, "dir": str(tracked.folder), "id": tracked.identity, "resume": "allow"}
        self._asked = about | settings
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
        run = wandb.init(**self._asked, reinit="create_new", settings=quiet)
        if self._of_run:
            run.define_metric("step", hidden=True)
            for family in ("train/*", "validation/*"):
                run.define_metric(family, step_metric="step")
        return run

    def log_hyperparams(self, settings: Mapping[str, Any]) -> None:
        """Settings, in the run's configuration."""
        self.experiment.config.update(dict(settings), allow_val_change=True)

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
        import wandb

        table = wandb.Table(columns=list(header), data=[list(row) for row in rows])
        self.log_metrics({f"tables/{name}": table})

    def pages(self, paths: Sequence[Path]) -> None:
        """The pages as one artifact."""
        import wandb

        pages = wandb.Artifact(f"report-{self._asked['id']}", type="report")
        for path in paths:
            pages.add_file(str(path))
        self.experiment.log_artifact(pages)
