"""What many cells of a grid share is found out once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Result = TypeVar("Result")
_known: ContextVar[dict[str, Any] | None] = ContextVar("known", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """While the body runs, nothing is found out twice by `once` and `once_as_read`: what lies on the disk is taken
    to stay as it is so long. Inside another such body nothing begins anew."""
    known = _known.get()
    token = _known.set({} if known is None else known)
    try:
        yield
    finally:
        _known.reset(token)


def once(about: Any, find: Callable[[], Result]) -> Result:
    """What `find` gives; inside `sharing` what it gave before, where it was asked `about` equal plain values. What
    it raises is raised and not kept."""
    known = _known.get()
    if known is None:
        return find()
    if (key := _key(about)) not in known:
        known[key] = find()
    return known[key]


def once_as_read(about: Any, settings: Mapping[str, Any], find: Callable[[Mapping[str, Any]], Result]) -> Result:
    """What `find(settings)` gives; inside `sharing` what it gave before `about` the same, where all settings that
    it looked at then have the values that they had. It must hang on nothing else that differs between cells."""
    known = _known.get()
    if known is None:
        return find(settings)
    ways: set[tuple[str, ...]] = known.setdefault(_key(["read", about]), set())
    for names in ways:
        if (key := _key([about, _read_of(settings, names)])) in known:
            return known[key]
    noted = Noted(settings)
    result = find(noted)
    ways.add(names := tuple(sorted(noted.names)))
    known[_key([about, _read_of(settings, names)])] = result
    return result


class Noted(Mapping):
    """Settings that note the names of those that are looked at."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings, self.names = settings, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return self._settings[name]

    def __iter__(self) -> Iterator[str]:
        self.names |= self._settings.keys()
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)


def _read_of(settings: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
    """Whether settings have each of these names, and its value."""
    return [[name, name in settings, settings.get(name)] for name in names]


def _key(about: Any) -> str:
    return json.dumps(about, sort_keys=True, default=str)
