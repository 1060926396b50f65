"""What units are scored by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sddx.config.build import Settings


def scored_by(settings: Mapping[str, Any], *, alone: bool) -> dict[str, Settings]:
    """The metrics that are asked for, by the setting where each stands: where scoring is run `alone`
    (stages=[score]) all that are compared, and else the one that chooses the cut, if one does."""
    if alone:
        return {f"metrics.{name}": node for name, node in settings["metrics"].items() if node is not None}
    metric = settings["pruning"].get("metric")
    return {} if metric is None else {"pruning.metric": metric}
