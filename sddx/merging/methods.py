"""What several students' tensors of one name become.

Each is `method(parents, base, place)`: the students' tensors, that of the pruned model before training (all of
one shape and dtype), and where they stand. It returns the merged tensor and the way that was taken, and computes in
float32 or wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import acos, sin, sqrt
from typing import Literal

import torch
from torch import Tensor

from sddx.errors import UserError
from sddx.records import PositiveShare, Seed, Share

PIECE = 2**16  # numbers that a cache holds
STRAIGHT = 0.9995  # a cosine above which an arc is a line, but for rounding
NONE = 1e-8  # weights that sum to less divide nothing
Weights = Sequence[float | Sequence[float]]  # one a student: a number, or one for each block
Merged = tuple[Tensor, str]


@dataclass(frozen=True)
class Place:
    """A tensor's name in the model, and the number of the block it is in (None: it is in none)."""

    name: str
    block: int | None = None


def slerp(
    parents: Sequence[Tensor],
    base: Tensor,
    place: Place,
    *,
    t: Share | Sequence[Share] = 0.5,
    of: Literal["weights", "differences"] = "weights",
) -> Merged:
    """The point a share `t` along the arc from the first student to the second (Shoemake, SIGGRAPH 1985): with the
    angle w between the flattened tensors, (sin((1 - t) w) x + sin(t w) y) / sin(w).

    A line where their cosine is above 0.9995 in size or one of them is zero, which holds for most tensors of
    siblings. `of` differences, the arc is between what each learned, and put onto the base. `t` may be one for each
    block; outside of blocks it is their mean. Raises UserError unless there are two students."""
    if len(parents) != 2:
        raise UserError(f"merging=slerp goes from one student to another, and there are {len(parents)}. Give two.")
    share = _at(t, place)
    if share in (0, 1):
        return parents[int(share)], "parent"
    x, y = map(_wide, parents)
    if of == "weights":
        merged, way = _arc(x, y, share)
    else:
        origin = _wide(base)
        merged, way = _arc(x - origin, y - origin, share)
        merged += origin
    return merged.to(base.dtype), way


def _arc(x: Tensor, y: Tensor, share: float) -> Merged:
    cosine = _cosine(x, y)
    if abs(cosine) > STRAIGHT:
        return torch.lerp(x, y, share), "line"
    angle = acos(cosine)
    first, second = (sin(part * angle) / sin(angle) for part in (1 - share, share))
    return (first * x).add_(y, alpha=second), "arc"


def _cosine(x: Tensor, y: Tensor) -> float:
    """Of two tensors as vectors, in one pass over memory; 1 where one of them is zero."""
    parts = zip(x.flatten().split(PIECE), y.flatten().split(PIECE), strict=True)
    sums = torch.stack([torch.stack([a @ a, b @ b, a @ b]) for a, b in parts]).double().sum(0)
    xx, yy, xy = sums.tolist()
    return xy / sqrt(xx * yy) if xx * yy > 0 else 1.0


def linear(parents: Sequence[Tensor], base: Tensor, place: Place, *, weights: Weights | None = None) -> Merged:
    """The weighted sum of the students' tensors (model soups, 2203.05482); equal weights that sum to 1 unless some
    are given. Raises UserError where there are not as many weights as students."""
    shares = _shares(weights, len(parents), place)
    if sorted(shares) == [0.0] * (len(shares) - 1) + [1.0]:
        return parents[shares.index(1.0)], "parent"
    first, *others = (_wide(each) for each in parents)
    merged = sum(shares) * first  # of equal students, themselves to the last bit
    for share, other in zip(shares[1:], others, strict=True):
        merged = merged + share * (other - first)
    return merged.to(base.dtype), "line"


def task_arithmetic(
    parents: Sequence[Tensor], base: Tensor, place: Place, *, weights: Weights | None = None
) -> Merged:
    """The base and the weighted sum of what each student learned (2212.04089). Raises UserError as `linear`
    does."""
    return _summed(_learned(parents, base), base, place, weights)


def ties(
    parents: Sequence[Tensor],
    base: Tensor,
    place: Place,
    *,
    weights: Weights | None = None,
    density: PositiveShare = 0.2,
) -> Merged:
    """The base and, of what each student learned, the largest share `density` of its values, those whose sign their
    weighted sum has, averaged by weight over the students that have it (TIES, 2306.01708; weights as mergekit has
    them: only their ratios count). Raises UserError as `linear` does."""
    from peft.utils import merge_utils

    learned = torch.stack([_pruned(each, density, "magnitude") for each in _learned(parents, base)])
    shares = learned.new_tensor(_shares(weights, len(parents), place))
    shares = merge_utils.reshape_weight_task_tensors(learned, shares)
    weighted = shares * learned
    agree = merge_utils.calculate_majority_sign_mask(weighted)
    total = (shares * agree).sum(0)
    total[total.abs() < NONE] = 1
    return _onto(base, (weighted * agree).sum(0) / total)


def dare(
    parents: Sequence[Tensor],
    base: Tensor,
    place: Place,
    *,
    weights: Weights | None = None,
    density: PositiveShare = 0.2,
    seed: Seed = 0,
) -> Merged:
    """The base and the weighted sum of a random share `density` of what each student learned, enlarged by as much
    (DARE, 2311.03099). What is drawn is a function of the seed, the student's number and the tensor's name alone.
    Raises UserError as `linear` does."""
    learned = []
    for number, each in enumerate(_learned(parents, base)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(sha256(f"{seed}/{number}/{place.name}".encode()).hexdigest()[:15], 16))
            learned.append(_pruned(each, density, "random"))
    return _summed(learned, base, place, weights)


def _summed(learned: list[Tensor], base: Tensor, place: Place, weights: Weights | None) -> Merged:
    from peft.utils import merge_utils

    shares = _shares(weights, len(learned), place)
    return _onto(base, merge_utils.task_arithmetic(learned, learned[0].new_tensor(shares)))


def _pruned(learned: Tensor, density: float, which: Literal["magnitude", "random"]) -> Tensor:
    from peft.utils import merge_utils

    return learned if density == 1 else merge_utils.prune(learned, density, which, rescale=which == "random")


def _learned(parents: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    return [_wide(each) - _wide(base) for each in parents]


def _onto(base: Tensor, learned: Tensor) -> Merged:
    return (_wide(base) + learned).to(base.dtype), "line"


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _shares(weights: Weights | None, count: int, place: Place) -> list[float]:
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise UserError(
            f"merging.method.weights are {len(weights)}, and {count} students are merged. Give one for each."
        )
    return [_at(each, place) for each in weights]


def _at(setting: float | Sequence[float], place: Place) -> float:
    """A setting at a tensor's place, where it may be one for each block."""
    if not isinstance(setting, Sequence):
        return float(setting)
    if place.block is None:
        return sum(setting) / len(setting)
    if place.block >= len(setting):
        raise UserError(
            f"merging.method gives {len(setting)} numbers, one for each block, and the students have more. "
            "Give one for each block that is left, or one number."
        )
    return float(setting[place.block])
