"""The models that a run judged, by their role in it: tables, pages and comparisons loop over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sddx.records import ROLES


def roles(run: Mapping[str, Any]) -> dict[str, str]:
    """The role of each model that a summary has scores of, by its name, the reference first."""
    listed = {each["name"]: each["role"] for each in run.get("subjects", ())} or ROLES
    return {name: role for name, role in listed.items() if name in run["scores"]}


def having(run: Mapping[str, Any], role: str) -> str | None:
    """The name of the first model with this role; None where there is none."""
    return next((name for name, each in roles(run).items() if each == role), None)


def reference(run: Mapping[str, Any]) -> str:
    """The name of the model that all others are compared with."""
    return next(iter(roles(run)))
