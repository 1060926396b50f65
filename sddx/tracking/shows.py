"""What every logger of ours can be asked to show of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
