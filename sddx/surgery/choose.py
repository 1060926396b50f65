"""Rules that turn scores into a cut. Each is `rule(scores, total, remove)`: the dict that `score_blocks`
wrote (or None where the rule needs none), the number of blocks, how many of them to remove."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from sddx.records import Cut, UserError


@dataclass(frozen=True)
class Pruning:
    """The `pruning` group: a rule, how many blocks it removes, and the metric that it reads (if any)."""

    choose: Callable[[dict[str, Any] | None, int, int], Cut]
    remove: int
    metric: Callable | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.remove, int) or self.remove < 0:
            raise UserError(f"pruning.remove={self.remove!r} is not a number of blocks. Give 0 or more.")


def contiguous(scores: dict[str, Any] | None, total: int, remove: int) -> Cut:
    """The run of `remove` blocks across which the hidden state turns least (Gromov et al., arXiv 2403.17887).

    Reads `scores["mean"]` as distances [total + 1, total + 1]: entry [i, i + remove] is the cost of removing
    blocks i to i + remove - 1. Ties go to the earliest start. Raises UserError where too many blocks are to
    go, or the scores have another shape.
    """
    require_removable(total, remove)
    distance = _mean(scores, "contiguous", "angular_distance")
    square = len(distance) == total + 1 and all(isinstance(row, list) for row in distance)
    if not square or any(len(row) != total + 1 for row in distance):
        raise UserError(
            f"pruning by contiguous blocks needs distances between all {total + 1} states of {total} blocks, "
            f"and the scores have another shape. Score with sddx.importance.metrics.angular_distance."
        )
    start = min(range(total - remove + 1), key=lambda block: distance[block][block + remove])
    return Cut.without(range(start, start + remove), total)


def lowest(scores: dict[str, Any] | None, total: int, remove: int) -> Cut:
    """Without the `remove` blocks of lowest influence, wherever they sit (ShortGPT, arXiv 2403.03853).

    Reads `scores["mean"]` as one value per block; ties go to the earlier block. Raises UserError where too
    many blocks are to go, or the scores have another shape.
    """
    require_removable(total, remove)
    influence = _mean(scores, "lowest", "block_influence")
    if len(influence) != total or any(isinstance(value, list) for value in influence):
        raise UserError(
            f"pruning by lowest influence needs one score for each of {total} blocks, and the scores have "
            f"another shape. Score with sddx.importance.metrics.block_influence."
        )
    order = sorted(range(total), key=lambda block: influence[block])
    return Cut.without(set(order[:remove]), total)


def last(scores: dict[str, Any] | None, total: int, remove: int) -> Cut:
    """Without the deepest `remove` blocks, except that the very last stays: the simple variant of Gromov et
    al. (facts D1), whose "L - n to L - 1" count from 1. Counted from 0: total - remove - 1 to total - 2."""
    require_removable(total, remove)
    return Cut.without(range(total - 1 - remove, total - 1), total)


def random(scores: dict[str, Any] | None, total: int, remove: int, *, seed: int) -> Cut:
    """Without `remove` blocks drawn at random. With one seed, a larger cut contains every smaller one."""
    require_removable(total, remove)
    order = Random(seed).sample(range(total), total)
    return Cut.without(set(order[:remove]), total)


def require_removable(total: int, remove: int) -> None:
    """Raises UserError where more blocks are to go than the model can lose."""
    if not 0 <= remove < total:
        raise UserError(
            f"pruning.remove={remove}, but the model has {total} blocks and at least one must stay. "
            f"Give a number from 0 to {total - 1}."
        )


def _mean(scores: dict[str, Any] | None, rule: str, metric: str) -> list:
    if scores is None:
        raise UserError(
            f"the rule {rule!r} reads scores, and none were measured. Set pruning.metric to "
            f"sddx.importance.metrics.{metric}."
        )
    return scores["mean"]
