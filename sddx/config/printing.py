"""What is printed arrives, whatever the terminal, the log or the pipe can carry."""

from __future__ import annotations

import io
import sys


def print_anywhere() -> None:
    """From now on, signs that standard output or error cannot carry (PYTHONIOENCODING=ascii) are written as their
    numbers, `\\xb1` for a plus-minus sign, instead of ending the program after all its work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
