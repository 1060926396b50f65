"""Rules that turn scores into what is removed. Each is `rule(scores, count, remove)`: what the metric gave (or
None where the rule needs none), the number of units, how many of them to remove; it returns their numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from sddx.errors import UserError
from sddx.records import Natural, Seed, Units

Rule = Callable[[dict[str, Any] | None, int, int], tuple[int, ...]]


NOT_FOLDABLE = (
    "pruning.patch.fold=true: this patch acts on the whole residual stream, which runs past every weight before "
    "the junction, so that no weight can take it. Use pruning/patch=linear_ffn or mean, or fold=false."
)


@dataclass(frozen=True)
class PatchChoice:
    """What stands in for the removed parts (`pruning.patch`): a fit (null: nothing), whether it goes on learning
    with the student, and whether it is folded into weights that are there already."""

    fit: Any
    trained: bool
    fold: bool

    def __post_init__(self) -> None:
        if self.fit is not None and not hasattr(self.fit, "reads"):
            raise UserError(
                f"pruning.patch.fit makes a {type(self.fit).__name__}, which fits nothing. Choose one with "
                "pruning/patch=... (mean, diagonal, low_rank, linear, linear_ffn, block)."
            )
        if self.fold and not getattr(self.fit, "foldable", False):
            raise UserError(NOT_FOLDABLE)
        if self.fold and self.trained:
            raise UserError(
                "pruning.patch.fold=true leaves no weights that could be trained apart: set pruning.patch.trained="
                "false (with tuning=full all weights are trained anyway)."
            )


@dataclass(frozen=True)
class Pruning:
    """The `pruning` group: a rule, which units it removes and how many, the metric that it reads (if any), what
    stands in for them, and whether the blocks that are left must be of the kinds that a model of that depth has."""

    choose: Rule
    remove: Natural
    patch: PatchChoice
    units: str = "blocks"
    metric: Any = None
    keep_pattern: bool = False

    def __post_init__(self) -> None:
        Units(self.units, 1)
        if self.keep_pattern and self.units != "blocks":
            raise UserError(
                f"pruning.keep_pattern=true and pruning.units={self.units}: the kinds of blocks move only where "
                "whole ones go. Leave keep_pattern out, or use pruning.units=blocks."
            )

    @property
    def is_stock(self) -> bool:
        """Whether transformers itself can build what is left: whole blocks alone go, and what stands in for them is
        folded into weights, or a block of the model's own kind."""
        inside = self.patch.fit is None or self.patch.fold or self.patch.fit.reads == "preceding"
        return not self.remove or (self.units == "blocks" and inside)


def contiguous(scores: dict[str, Any] | None, count: int, remove: int) -> tuple[int, ...]:
    """The run of `remove` units that matters least.

    `scores["mean"]` as distances [count + 1, count + 1]: entry [i, i + remove] is the cost of removing units i
    to i + remove - 1 (Gromov et al., arXiv 2403.17887). As one value a unit: the run with the least sum. Ties
    go to the earliest start. Raises UserError where too many units are to go, or the scores have another shape.
    """
    require_removable(count, remove)
    mean = _mean(scores, "contiguous", "angular_distance")
    starts = range(count - remove + 1)
    if _is_square(mean, count):
        start = min(starts, key=lambda unit: mean[unit][unit + remove])
    elif _is_flat(mean, count):
        start = min(starts, key=lambda unit: sum(mean[unit : unit + remove]))
    else:
        raise UserError(
            f"pruning by a contiguous run needs distances between all {count + 1} states of {count} units, or one "
            f"score for each, and the scores have another shape. Score with "
            f"sddx.importance.metrics.angular_distance and the same pruning.units."
        )
    return tuple(range(start, start + remove))


def lowest(scores: dict[str, Any] | None, count: int, remove: int) -> tuple[int, ...]:
    """The `remove` units of lowest score, wherever they sit (ShortGPT, arXiv 2403.03853).

    Reads `scores["mean"]` as one value a unit; ties go to the earlier one. Raises UserError where too many
    units are to go, or the scores have another shape.
    """
    require_removable(count, remove)
    influence = _mean(scores, "lowest", "block_influence")
    if not _is_flat(influence, count):
        raise UserError(
            f"pruning by lowest influence needs one score for each of {count} units, and the scores have "
            f"another shape. Score with sddx.importance.metrics.block_influence and the same pruning.units."
        )
    return tuple(sorted(ranked(influence)[:remove]))


def ranked(influence: list[float]) -> list[int]:
    """Units from least to most important; ties in their order."""
    return sorted(range(len(influence)), key=lambda unit: influence[unit])


def last(scores: dict[str, Any] | None, count: int, remove: int) -> tuple[int, ...]:
    """The deepest `remove` units, except that the very last stays while any does: the simple variant of Gromov et
    al. (arXiv 2403.17887), whose "L - n to L - 1" count from 1. Counted from 0: count - remove - 1 to count - 2."""
    require_removable(count, remove)
    start = max(count - 1 - remove, 0)
    return tuple(range(start, start + remove))


def random(scores: dict[str, Any] | None, count: int, remove: int, *, seed: Seed) -> tuple[int, ...]:
    """`remove` units drawn at random. With one seed, a larger draw contains every smaller one."""
    require_removable(count, remove)
    order = Random(seed).sample(range(count), count)
    return tuple(sorted(order[:remove]))


def require_removable(count: int, remove: int, what: str = "units") -> None:
    """Raises UserError where more is to go than the model has."""
    if not 0 <= remove <= count:
        raise UserError(
            f"pruning.remove={remove}, but the model has {count} {what}. Give a number from 0 to {count}."
        )


def _is_flat(mean: list, count: int) -> bool:
    return len(mean) == count and not any(isinstance(value, list) for value in mean)


def _is_square(mean: list, count: int) -> bool:
    return len(mean) == count + 1 and all(isinstance(row, list) and len(row) == count + 1 for row in mean)


def _mean(scores: dict[str, Any] | None, rule: str, metric: str) -> list:
    if scores is None:
        raise UserError(
            f"the rule {rule!r} reads scores, and none were measured. Set pruning.metric to "
            f"sddx.importance.metrics.{metric}."
        )
    return scores["mean"]
