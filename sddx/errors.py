"""What goes wrong and is told, or passed on. Apart from all that computes: no key hangs on it."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Callable, Sequence
from typing import Any


class UserError(Exception):
    """A mistake, or several, that the user can mend: what was wrong, what was given, what to do.

    Entry points print the message without a traceback and exit with status 2.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class Interrupted(SystemExit):
    """This process was told to end (SIGTERM) and has saved what the same command goes on from. Left alone, it ends
    the process with the status that a shell gives to that signal."""

    def __init__(self, status: int = 128 + signal.SIGTERM) -> None:
        super().__init__(status)


def mistakes_of(checks: Sequence[Callable[[], Any]], *, shaky: bool = False) -> list[str]:
    """The mistakes that these checks raise, in their order. On `shaky` ground, where other mistakes are known, a
    check may fail in any other way, which says nothing."""
    wrong: list[str] = []
    for each in checks:
        try:
            each()
        except UserError as error:
            wrong.extend(error.args)
        except Exception:
            if not shaky:
                raise
    return wrong


def require_none(wrong: Sequence[str]) -> None:
    """Raises one UserError with these mistakes, each named once, where there are any."""
    if wrong:
        raise UserError(*dict.fromkeys(wrong))


def near(key: str, names: Sequence[str], prefix: str) -> str:
    """A question after the name that is most like a key, if any is."""
    matches = difflib.get_close_matches(key, names, n=1)
    return f" Did you mean {prefix}{matches[0]}?" if matches else ""
