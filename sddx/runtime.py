"""What a stage may use that must never change a number: device, workers, progress, metric rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


def _ignore(row: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Runtime:
    """Handed to every stage and not hashed. `log` takes one flat row of metrics (`step` where it has one)."""

    device: str = "cpu"
    workers: int = 0
    quiet: bool = False
    log: Callable[[dict[str, Any]], None] = _ignore

    def progress(self, items: Iterable | None = None, *, total: int | None = None, what: str, unit: str) -> Any:
        """A tqdm bar with rate and time left; wraps `items`, or is moved by `.update(n)`."""
        from tqdm import tqdm

        return tqdm(items, total=total, desc=what, unit=unit, disable=self.quiet, dynamic_ncols=True, smoothing=0.1)
