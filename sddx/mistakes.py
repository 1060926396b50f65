"""All mistakes at once: checks that each raise UserError, asked one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sddx.records import UserError


def told(checks: Sequence[Callable[[], Any]]) -> list[str]:
    """The mistakes that these checks raise, in their order."""
    wrong: list[str] = []
    for each in checks:
        try:
            each()
        except UserError as error:
            wrong.extend(error.args)
    return wrong


def require_none(wrong: Sequence[str]) -> None:
    """Raises one UserError with these mistakes, each named once, where there are any."""
    if wrong:
        raise UserError(*dict.fromkeys(wrong))
