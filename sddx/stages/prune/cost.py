"""What pruning takes."""

from __future__ import annotations

from sddx.estimate import peaks
from sddx.estimate.costs import Estimate


def peak(estimate: Estimate) -> float | None:
    """The weights. Where models are in shards, the proof of a pruned one is in host memory."""
    return None if peaks.in_shards(estimate) else estimate.unpruned.weight_bytes
