"""What a whole configuration costs: what each of its stages says that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sddx.estimate.costs import Estimate
from sddx.stages.folders import modules


def estimated(config: Mapping[str, Any]) -> Estimate:
    """The estimate of a configuration, by the `cost` of those stages that it runs: `parts(estimate)`, the pieces of
    work, and `peak(estimate)`, the most bytes that it holds, or None. Raises UserError as `Estimate` does."""
    asked = config["stages"]
    costs = {stage: cost for stage, cost in modules("cost").items() if asked is None or stage in asked}
    return Estimate(config, costs)
