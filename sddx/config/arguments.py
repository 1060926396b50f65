"""Commands without a configuration: their `key=value` arguments, and how they end."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any

from sddx.config.printing import print_anywhere
from sddx.errors import UserError, near

REQUIRED = ""  # the default of a setting that must be given


def exit_status(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates an entry point: where it raises UserError, that is printed and the exit status is 2."""

    @wraps(main)
    def guarded(*arguments: Any) -> int:
        print_anywhere()
        try:
            return main(*arguments)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return guarded


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether a command line asks what the command takes."""
    return not {"-h", "--help"}.isdisjoint(arguments)


def plain_arguments(arguments: Sequence[str], usage: str | None, **defaults: str | None) -> dict[str, Any]:
    """The values of `key=value` arguments, as text, over their defaults; `null` is None where that is the
    default. Where help is asked for, `usage` is printed and the program ends.

    Raises UserError, with all that is wrong at once, for a key that is not among the defaults, one that is given
    twice, and one that has no value.
    """
    if asks_for_help(arguments):
        print(usage)
        raise SystemExit(0)
    pairs = [argument.partition("=") for argument in arguments]
    keys = [key for key, _, _ in pairs]
    wrong = [f"{key!r} is no setting of the form key=value." for key, sign, _ in pairs if not sign]
    wrong += [_unknown(key, list(defaults)) for key, sign, _ in pairs if sign and key not in defaults]
    wrong += [f"{key} is given more than once." for key in defaults if keys.count(key) > 1]
    optional = [key for key, value in defaults.items() if value is None]
    values = defaults | {key: None if value == "null" and key in optional else value for key, _, value in pairs}
    wrong += [f"{key} has no value. Give it as {key}=..." for key in defaults if values[key] == REQUIRED]
    if wrong:
        raise UserError(*wrong)
    return values


def duration(text: str) -> float:
    """A time of more than no seconds, as argparse takes it."""
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0. Give 5, for example.")


def _unknown(key: str, known: list[str]) -> str:
    return f"{key} is not a setting.{near(key, known, '')} Known here: {', '.join(known)}."


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
