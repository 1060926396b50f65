"""From a configuration node to what it names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate

from sddx.errors import UserError


@dataclass(frozen=True)
class Called:
    """In an annotation: a `_target_` stands there, and what it makes is called with so many values (None: it is not
    called, or not known with how many)."""

    values: int | None = None


PLAIN = (bool, int, float, str)
Node = Annotated[dict[str, Any], Called()]  # settings with the `_target_` that they are for
Settings = Mapping[str, Any]  # the same where they are only looked at


def only(node: Mapping[str, Any], names: Collection[str]) -> Node:
    """Of a node's settings those of these names; others have their defaults."""
    return {name: value for name, value in node.items() if name in names}


def with_defaults(settings: Any) -> Any:
    """Settings in which every call also has the plain values that its target takes for what is not given: what a
    check or a plan looks at, where no file of conf/ stands behind a group of the user's own."""
    if isinstance(settings, list):
        return [with_defaults(each) for each in settings]
    if not isinstance(settings, Mapping):
        return settings
    given = {name: with_defaults(each) for name, each in settings.items()}
    return {**_defaults(str(given["_target_"])), **given} if "_target_" in given else given


@cache
def _defaults(named: str) -> dict[str, Any]:
    """The plain defaults among what settings can give a target; none where it does not say."""
    try:
        target = get_object(named)
        parameters = inspect.signature(target).parameters.values()
    except Exception:  # whatever the import of a user's module raises: the check of the settings tells it
        return {}
    settable = [p for p in parameters if p.kind is p.KEYWORD_ONLY or inspect.isclass(target)]
    return {p.name: p.default for p in settable if p.default is None or isinstance(p.default, PLAIN)}


def made(node: Mapping[str, Any], kind: type, where: str) -> Any:
    """What a node makes. Raises UserError where that is of another kind."""
    result = build(node)
    if not isinstance(result, kind):
        raise UserError(
            f"{where}._target_={node.get('_target_')} makes a {type(result).__name__}, and a {kind.__name__} is "
            f"needed. The files of conf/{where} make one."
        )
    return result


def tried(where: str, function: Callable[..., Any], *values: Any) -> Any:
    """What a function gives for these values. Raises UserError, its own or one that names the setting, where it
    fails: found before anything is paid for, that is a mistake in the settings."""
    try:
        return function(*values)
    except UserError:
        raise
    except Exception as error:  # whatever a user's function raises
        message = (str(error).splitlines() or [""])[0]
        raise UserError(f"{where} failed when it was tried: {type(error).__name__}: {message}.") from error


def build(node: Mapping[str, Any]) -> Any:
    """Call a node's `_target_` with its other keys, nested nodes first; `_partial_: true` gives a function
    that waits for its positional arguments. Raises UserError where that fails: the target's own as itself, not in
    Hydra's wrapping."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        message = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{node.get('_target_')} cannot be made with its settings: {message}.") from error
