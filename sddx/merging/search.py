"""How much of the second of two students each block of a merge takes: looked for by what candidates score."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

from annotated_types import Interval, MinLen

from sddx.errors import UserError
from sddx.records import Count, PositiveShare, Seed, Share

Shares = tuple[float, ...]  # of the second student, one a block
Judge = Callable[[Shares], float]  # a score; higher is better
Slope = Annotated[float, Interval(ge=-2, le=2)]


@dataclass(frozen=True)
class Slopes:
    """Lines over depth: each of `levels` in the middle with each of `slopes`, what is gained from the first block
    to the last, kept between 0 and 1."""

    levels: Annotated[Sequence[Share], MinLen(1)]
    slopes: Annotated[Sequence[Slope], MinLen(1)]

    @property
    def most(self) -> int:
        """The most candidates beside the plain merge."""
        return len(self.levels) * len(self.slopes)

    def __call__(self, judge: Judge, plain: Shares) -> None:
        """Judge every line, for as many blocks as `plain` has."""
        for level, slope in product(self.levels, self.slopes):
            judge(_line(level, slope, len(plain)))


def _line(level: float, slope: float, count: int) -> Shares:
    places = [number / (count - 1) - 0.5 if count > 1 else 0.0 for number in range(count)]
    return tuple(round(min(max(level + slope * place, 0.0), 1.0), 6) for place in places)


@dataclass(frozen=True)
class Blocks:
    """One coordinate after another: groups of as many neighbouring blocks as `together`, in an order drawn by
    `seed`, go a `step` up, or where that does not score higher, down. Over after a round in which all stayed where
    they were, or `budget` candidates."""

    step: PositiveShare
    together: Count
    budget: Count
    seed: Seed

    @property
    def most(self) -> int:
        """The most candidates beside the plain merge."""
        return self.budget

    def __call__(self, judge: Judge, plain: Shares) -> None:
        """Judge candidates, from the plain merge on."""
        firsts = range(0, len(plain), self.together)
        groups = [range(first, first + self.together) for first in firsts]
        draws, at, left, moved = random.Random(self.seed), plain, self.budget, True
        while moved and left:
            moved = False
            for group in draws.sample(groups, len(groups)):
                for candidate in self._beside(at, group)[:left]:
                    left -= 1
                    if judge(candidate) > judge(at):
                        at, moved = candidate, True
                        break

    def _beside(self, at: Shares, group: range) -> list[Shares]:
        """With the shares of these blocks a step up, and a step down, where they can move."""
        return [moved for step in (self.step, -self.step) if (moved := _moved(at, group, step)) != at]


def _moved(shares: Shares, group: range, step: float) -> Shares:
    """The shares with those of these blocks so much higher, between 0 and 1."""
    return tuple(
        round(min(max(share + step, 0.0), 1.0), 6) if number in group else share
        for number, share in enumerate(shares)
    )


class Trials:
    """What candidates scored, each judged once; `known` are those that were judged before."""

    def __init__(self, judge: Judge, known: Mapping[Shares, float]) -> None:
        self._judge, self._known = judge, dict(known)
        self.scores: dict[Shares, float] = {}  # of what was asked for, in its order

    def __call__(self, shares: Shares) -> float:
        if shares not in self._known:
            self._known[shares] = self._judge(shares)
        return self.scores.setdefault(shares, self._known[shares])

    @property
    def best(self) -> Shares:
        """The first of those that score highest."""
        return max(self.scores, key=self.scores.__getitem__)


def plain_shares(method: Mapping[str, Any], blocks: int) -> Shares:
    """What each block takes without a search, by the settings of a method of merging. Raises UserError for one
    whose settings are no share of two students."""
    if "t" not in method and "weights" not in method:
        raise UserError(
            "merging.search sets t or weights, and merging.method has neither. Leave out merging.search."
        )
    if method.get("weights") is not None:
        raise UserError("merging.search looks for weights that sum to 1. Leave merging.method.weights at null.")
    start = method.get("t", 0.5)
    if not isinstance(start, Sequence):
        return (float(start),) * blocks
    if len(start) != blocks:
        raise UserError(
            f"merging.method.t has {len(start)} numbers for {blocks} blocks. Give one for each, or one."
        )
    return tuple(map(float, start))


def with_shares(method: Mapping[str, Any], shares: Sequence[float]) -> dict[str, Any]:
    """The settings of a method of merging at these shares."""
    if "t" in method:
        return {**method, "t": list(shares)}
    return {**method, "weights": [[1 - share for share in shares], list(shares)]}
