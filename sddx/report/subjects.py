"""The models that a run evaluated, by their role in it: tables, pages and comparisons loop over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from sddx.records import ROLES

UNTUNED = "untuned"


@dataclass(frozen=True)
class Score:
    """What a model scored in one task, in per cent: each seed's, and the standard error over items, the mean over
    seeds (None where no run says). `where` is what tells its runs from others."""

    where: str
    model: str
    role: str
    seeds: list[float]
    error: float | None

    def __str__(self) -> str:
        return f"{mean(self.seeds):.1f}" + ("" if self.error is None else f" ± {self.error:.1f}")


def roles(run: Mapping[str, Any]) -> dict[str, str]:
    """The role of each model that a summary has scores of, by its name, the reference first."""
    listed = {each["name"]: each["role"] for each in run.get("subjects", ())} or ROLES
    return {name: role for name, role in listed.items() if name in run["scores"]}


def having(run: Mapping[str, Any], role: str) -> str | None:
    """The name of the first model with this role; None where there is none."""
    return next((name for name, each in roles(run).items() if each == role), None)


def shown_as(run: Mapping[str, Any], name: str, arm: str) -> str:
    """What tables of many runs call a model: the pruned one, which every arm has, untuned; the student by its arm,
    and what became of it by both."""
    return {"cut": UNTUNED, "student": arm}.get(roles(run)[name], f"{arm}, {name}")


def reference(run: Mapping[str, Any]) -> str:
    """The name of the model that all others are compared with."""
    return next(iter(roles(run)))
