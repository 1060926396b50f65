"""What a logger is made for, and what of a row it can draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Tracked:
    """What a logger is made for. `identity` is derived from what was configured, so that a repeated run is the same
    run; `job` tells a run from the report of a sweep."""

    folder: Path
    identity: str
    name: str
    job: Literal["run", "report"] = "run"


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What a logger can draw."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
