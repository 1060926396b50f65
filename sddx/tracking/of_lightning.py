"""Lightning's own loggers, which show of a report what they can."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

from sddx.files.naming import file_name
from sddx.tracking.shows import Curves, Shows
from sddx.tracking.tracked import numbers


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
