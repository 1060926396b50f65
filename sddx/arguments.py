"""`key=value` arguments of the small entry points, and of those that leave no run folder behind."""

from __future__ import annotations

import difflib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sddx.records import UserError

REQUIRED = ""  # the default of a setting that must be given


def plain_arguments(given: Sequence[str], **defaults: str | None) -> dict[str, Any]:
    """The values of `key=value` arguments, as text, over their defaults; `null` is None.

    Raises UserError, with all that is wrong at once, for a key that is not among the defaults, one that is given
    twice, and one that has no value.
    """
    pairs = [argument.partition("=") for argument in given]
    keys = [key for key, _, _ in pairs]
    wrong = [f"{key!r} is no setting of the form key=value." for key, sign, _ in pairs if not sign]
    wrong += [_unknown(key, list(defaults)) for key, sign, _ in pairs if sign and key not in defaults]
    wrong += [f"{key} is given more than once." for key in defaults if keys.count(key) > 1]
    values = defaults | {key: None if value == "null" else value for key, _, value in pairs}
    wrong += [f"{key} has no value. Give it as {key}=..." for key in defaults if values[key] == REQUIRED]
    if wrong:
        raise UserError(*wrong)
    return values


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"{key} is not a setting.{meant} Known here: {', '.join(known)}."


def number(values: dict[str, Any], key: str) -> int:
    """A setting that counts something. Raises UserError where it is not a whole number of 1 or more."""
    if not str(values[key]).isdecimal() or int(values[key]) < 1:
        raise UserError(f"{key}={values[key]} is not a number of 1 or more. Give {key}=1, for example.")
    return int(values[key])


def one_of(values: dict[str, Any], key: str, known: Sequence[Any]) -> Any:
    """A setting with a few values. Raises UserError for any other."""
    if values[key] not in known:
        raise UserError(f"{key}={values[key]} is not known. Use one of {', '.join(map(str, known))}.")
    return values[key]


@contextmanager
def without_run_folder(*more: str) -> Iterator[None]:
    """While the body runs, the command line has overrides beside the user's, `more` and those by which Hydra leaves
    nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        given = (at for at, argument in enumerate(sys.argv) if "=" in argument and not argument.startswith("-"))
        at = next(given, len(sys.argv))  # overrides must stand together
        sys.argv[at:at] = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}", *more]
        yield
