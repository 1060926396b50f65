"""What a stage may use that must never change a number: device, progress, metric rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm


class _Bar(tqdm):
    """A bar that says to `watch` where it is whenever it is drawn, at most once a second."""

    def __init__(self, *arguments: Any, watch: Callable[[dict[str, Any]], None], **settings: Any) -> None:
        self._watch, self._told = watch, 0.0
        super().__init__(*arguments, **settings)

    def display(self, *arguments: Any, **settings: Any) -> Any:
        if time.monotonic() - self._told >= 1:
            self._told, state = time.monotonic(), self.format_dict
            rate = state["rate"] or (self.n / state["elapsed"] if state["elapsed"] else None)
            self._watch({"what": self.desc, "done": self.n, "total": self.total, "rate": rate})
        return super().display(*arguments, **settings)


_held: list[Callable[[], object]] = []


def held(release: Callable[[], object]) -> None:
    """Have `free_held` call this, which lets go of what is kept between stages."""
    _held.append(release)


def free_held() -> None:
    """Let go of all that is kept between stages: a stage needs the devices."""
    for release in _held:
        release()


def _ignore(row: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Runtime:
    """Handed to every stage and not hashed. `log` takes one flat row of metrics (`step` where it has one);
    `watch` is told where the bar stands that is drawn. With `shards` above 1 no device holds a model whole: what
    only looks at one runs in so many processes (`parallel.launch.sharded`). `training` holds how a training is run:
    settings that change its numbers by rounding alone."""

    device: str = "cpu"
    shards: int = 1
    quiet: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    log: Callable[[dict[str, Any]], None] = _ignore
    watch: Callable[[dict[str, Any]], None] = _ignore

    @property
    def roomy(self) -> str:
        """The device for work on whole weights: host memory where no other holds them."""
        return self.device if self.shards == 1 else "cpu"

    def progress(self, items: Iterable | None = None, *, total: int | None = None, what: str, unit: str) -> Any:
        """A tqdm bar with rate and time left; wraps `items`, or is moved by `.update(n)`."""
        settings = {"total": total, "desc": what, "unit": unit, "disable": self.quiet}
        return _Bar(items, watch=self.watch, dynamic_ncols=True, smoothing=0.1, **settings)

    @contextmanager
    def counting(
        self, total: int, *, what: str, unit: str, moved: str, shown: str, mean: bool = False
    ) -> Iterator[Runtime]:
        """A runtime under one bar over several stages: logged rows move it by their `moved`, and what they
        say of `shown` is added up beside it, or with `mean` averaged over what moved it."""
        with self.progress(total=total, what=what, unit=unit) as bar:
            counted = rows = 0

            def log(row: dict[str, Any]) -> None:
                nonlocal counted, rows
                bar.update(by := row.get(moved, 0))
                rows += by
                counted += row.get(shown, 0) * (by if mean else 1)
                value = f"{counted / max(rows, 1):.2%}" if mean else f"{counted:,}"
                bar.set_postfix_str(f"{shown.rsplit('/', 1)[-1]} {value}", refresh=False)
                self.log(row)

            yield replace(self, log=log)
