"""Importance by running the model without units: alone, one after the other, and in coalitions."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from sddx.errors import UserError
from sddx.importance.coalitions import Coalition, OfLogits, TaskScore, Value
from sddx.importance.score import Subject, Sums, Work, require_sequences
from sddx.importance.uncertainty import Sources, errors, membership
from sddx.records import Batch, Count, Natural, Seed, Share, Units
from sddx.runtime import Runtime


class Ablation:
    """A metric that asks what coalitions are worth."""

    value: Any
    alone = False  # whether each text is read by itself

    def measure(self, subject: Subject) -> dict[str, Any]:
        """The summary over the units, as `sddx.importance.score.score_units` gives it."""
        raise TypeError(f"{type(self).__name__} measures nothing")

    def require(self, units: int) -> None:
        """Raises UserError where so many units cannot be measured."""

    def work(self, units: Units, texts: int) -> Work:
        """What `measure` runs, found by running it with a value that only counts: where it may stop early, the
        most; where what it asks next depends on what it found, for other findings."""
        counting = copy(self)
        counting.value = counted = Counted(self.value)
        labels = torch.tensor([[0, -100]]).expand(texts, -1)
        batch = Batch(torch.zeros_like(labels), torch.ones_like(labels), labels)
        counting.measure(Subject(None, None, units, [batch], Runtime(quiet=True)))
        sums = {name: sum(getattr(work, name) for work in counted.asked) for name in ("body", "head", "models")}
        return Work(**sums, alone=self.alone)


class Counted:
    """A value that finds noise, runs no model, and notes what `value` would run."""

    def __init__(self, value: Value) -> None:
        self.value, self.asked = value, list[Work]()
        self.sequences = getattr(value, "sequences", None)
        self.noise = torch.Generator().manual_seed(0)

    def of(self, subject: Subject, coalitions: Sequence[Coalition]) -> Tensor:
        """Noise in place of values, [coalitions, sequences]; what they would take is noted in `asked`."""
        self.asked.append(self.value.work(subject, coalitions))
        return torch.rand(len(coalitions), subject.sequences, generator=self.noise, dtype=torch.float64)


class LeaveOneOut(Ablation):
    """What is lost when one unit is taken out of the whole model. With `released`, shifted as in the code of arXiv
    2407.16286: the mean value of the runs that lack another unit, minus that of the run that lacks this one."""

    def __init__(self, *, value: Value, released: bool = False) -> None:
        self.value, self.released = value, released

    def measure(self, subject: Subject) -> dict[str, Any]:
        """The summary over items."""
        count = len(subject.units)
        values = self.value.of(subject, [_without(count, []), *(_without(count, [unit]) for unit in range(count))])
        whole, lacking = values[:1], values[1:]
        if self.released:
            whole = (lacking.sum(0) - lacking) / (count - 1)
        sums = Sums()
        sums.add((whole - lacking).T)
        return sums.summary()


class Greedy(Ablation):
    """The order in which units go if each time the least missed one is removed and all others are scored again
    (SLEB, arXiv 2402.09025, whose exact rule is not known here). A unit's score is its place in that order;
    those that outlast `until` removals follow by what they would have cost in the place of the last one."""

    def __init__(self, *, value: Value, until: Natural) -> None:
        self.value, self.until = value, until

    def require(self, units: int) -> None:
        """Raises UserError where more are to go than there are."""
        if not 0 <= self.until < units:
            raise UserError(
                f"pruning.metric.until={self.until}, but there are {units} units. Give 0 to {units - 1}."
            )

    def measure(self, subject: Subject) -> dict[str, Any]:
        """The summary: places in the order, and under `costs` what each removal cost."""
        self.require(count := len(subject.units))
        gone: list[int] = []
        costs, items = [], 0
        for _ in subject.runtime.progress(range(max(self.until, 1)), what="greedy removal", unit="unit"):
            rest = [unit for unit in range(count) if unit not in gone]
            tried = [_without(count, gone), *(_without(count, [*gone, unit]) for unit in rest)]
            values = self.value.of(_quiet(subject), tried)
            lost, items = (values[0] - values[1:]).mean(1), values.shape[1]
            order = [rest[place] for place in lost.argsort(stable=True)]
            costs.append(float(lost.min()))
            gone.append(order[0])
        places = {unit: place for place, unit in enumerate([*gone, *order[1:]])}
        mean = [float(places[unit]) for unit in range(count)]
        return {"mean": mean, "stderr": None, "half_width": None, "sequences": items, "subsets": [], "costs": costs}


class RandomSubnetworks(Ablation):
    """The mean value of random subnetworks with the unit, minus that of those without it: `count` for each text,
    that keep a share `keep` of the units (the second released estimator of arXiv 2407.16286)."""

    alone = True

    def __init__(self, *, value: OfLogits, count: Count = 10, keep: Share = 0.5, seed: Seed = 0) -> None:
        if not isinstance(value, OfLogits):
            raise UserError("random subnetworks are drawn for each text: value must be Loss or LogitDistance.")
        if count < 1 or not 0 < keep < 1:
            raise UserError(f"random subnetworks: count={count} must be at least 1, keep={keep} between 0 and 1.")
        self.value, self.count, self.keep, self.seed = value, count, keep, seed

    def measure(self, subject: Subject) -> dict[str, Any]:
        """The summary. Raises UserError where a unit is in all subnetworks or in none."""
        dice, present, worth = Random(self.seed), [], []
        texts = subject.texts(self.value.sequences)
        if not texts:
            raise UserError("random subnetworks need a loss, and no calibration text has a token after the first.")
        for text in subject.runtime.progress(texts, what="random subnetworks", unit="text"):
            drawn = [self._draw(dice, len(subject.units)) for _ in range(self.count)]
            present.append(drawn)
            worth.append(self.value.of(_quiet(text), drawn)[:, 0])
        parts = self._parts(torch.tensor(present).double(), torch.stack(worth))
        return {"mean": parts.mean(0).tolist(), "sequences": len(texts), "subsets": []} | errors({"texts": parts})

    def _parts(self, has: Tensor, value: Tensor) -> Tensor:
        """The difference of the means, by text [texts, units], from `has` [texts, draws, units] and `value` [texts,
        draws]. How many of a text's subnetworks have a unit is chance, so that each mean is a ratio: its parts are
        linear in what a text adds to the numerator and to the denominator, and texts are what is independent."""
        parts = torch.zeros(()).double()
        for sign, chosen in ((1, has), (-1, 1 - has)):
            count = chosen.sum((0, 1))
            if bool((count < 2).any()):
                raise UserError(
                    f"a unit is in less than two of {value.numel()} random subnetworks, or outside less than two, "
                    "so that it has no score. Raise count, or give more texts."
                )
            mean = torch.einsum("tdu,td->u", chosen, value) / count
            surplus = torch.einsum("tdu,tdu->tu", chosen, value[:, :, None] - mean)
            parts = parts + sign * (mean + len(value) * surplus / count)
        return parts

    def _draw(self, dice: Random, units: int) -> Coalition:
        chosen = set(dice.sample(range(units), int(self.keep * units)))
        return tuple(unit in chosen for unit in range(units))


class Shapley(Ablation):
    """What a unit adds to a coalition, averaged over orders of removal (Shapley's value), or only over coalitions
    that keep at least a share `keep` of the units (a semivalue; nearly empty models are never deployed).

    Orders are drawn in antithetic pairs, each with its reverse. Each order is cut into runs of (1 - keep) of
    the units, the last one shorter where they do not divide; every run is removed one by one from the whole
    model, so that each unit gets one value per order. With keep = 0 a run is the whole order and the values of
    each order add up to the value of all units minus that of none.

    It stops when the `lowest` units of least value are known with 95 %, texts and orders being drawn by chance,
    or after `orders` (`lowest` null: at `orders`). What only a rare coalition costs may not be met in a few
    orders, and the interval is then too narrow: with less than 32 orders it holds less often than it says.
    """

    def __init__(
        self, *, value: Value, keep: Share = 0.7, orders: Count = 32, lowest: Natural | None = None, seed: Seed = 0
    ) -> None:
        if not 0 <= keep < 1 or orders < 4 or orders % 2:
            raise UserError(
                f"shapley: keep={keep} and orders={orders}; keep is a share from 0 to less than 1, orders an even "
                "number of at least 4."
            )
        self.value, self.keep, self.orders, self.lowest, self.seed = value, keep, orders, lowest, seed

    def require(self, units: int) -> None:
        """Raises UserError where a model without any unit is to be asked what only one with some can do."""
        if isinstance(self.value, TaskScore) and int((1 - self.keep) * units + 1e-9) >= units:
            raise UserError(
                f"pruning.metric.keep={self.keep} asks for tasks' scores without any unit. Give a keep above 0."
            )

    def measure(self, subject: Subject) -> dict[str, Any]:
        """The summary; its errors are those of texts and orders drawn anew, together. `orders` says how many were
        drawn, `stable` with which probability the lowest units are these."""
        require_sequences("shapley", subject.sequences, 1)
        self.require(count := len(subject.units))
        dice = Random(self.seed)
        length = max(int((1 - self.keep) * count + 1e-9), 1)
        known: dict[Coalition, Tensor] = {}
        pairs: list[Tensor] = []
        stable = None
        with subject.runtime.progress(total=self.orders, what="orders of removal", unit="order") as bar:
            while 2 * len(pairs) < self.orders and not (stable is not None and stable >= 0.95):
                wanted = min(4, self.orders // 2 - len(pairs))  # together: more of them share their first blocks
                orders = [dice.sample(range(count), count) for _ in range(wanted)]
                chains = [[_runs(order, length), _runs(order[::-1], length)] for order in orders]
                self._evaluate(_quiet(subject), [run for pair in chains for order in pair for run in order], known)
                pairs += [
                    torch.stack([_marginals(order, count, known) for order in pair]).mean(0) for pair in chains
                ]
                stable = self._known(_sources(torch.stack(pairs)))
                bar.update(2 * wanted)
        return self._summary(torch.stack(pairs), stable)

    def _evaluate(self, subject: Subject, runs: Sequence[Sequence[int]], known: dict[Coalition, Tensor]) -> None:
        count = len(subject.units)
        chains = [_without(count, run[:taken]) for run in runs for taken in range(len(run) + 1)]
        new = [coalition for coalition in dict.fromkeys(chains) if coalition not in known]
        if new:
            known.update(zip(new, self.value.of(subject, new), strict=True))

    def _known(self, sources: Sources) -> float | None:
        """The probability that the lowest units are these; None where it was not asked for, or cannot be told."""
        enough = len(sources["orders"]) >= 4 and len(sources["texts"]) > 1
        if self.lowest is None or not enough or not 0 < self.lowest < sources["texts"].shape[1]:
            return None
        return membership(sources, self.lowest, self.seed)

    def _summary(self, pairs: Tensor, stable: float | None) -> dict[str, Any]:
        """`pairs` are [pairs, units, items]."""
        sources, by_items = _sources(pairs), Sums()
        by_items.add(sources["texts"])
        return by_items.summary() | errors(sources) | {"orders": 2 * len(pairs), "stable": stable}


def _sources(pairs: Tensor) -> Sources:
    """What the scores are means of, by each of what was drawn: texts (or the draws of items), and pairs of orders,
    because the two orders of a pair are not independent."""
    return {"texts": pairs.mean(0).T, "orders": pairs.mean(2)}


def _quiet(subject: Subject) -> Subject:
    """The same subject without bars of its own."""
    return replace(subject, runtime=replace(subject.runtime, quiet=True))


def _without(count: int, removed: Sequence[int]) -> Coalition:
    return tuple(unit not in removed for unit in range(count))


def _runs(order: Sequence[int], length: int) -> list[list[int]]:
    return [list(order[start : start + length]) for start in range(0, len(order), length)]


def _marginals(runs: Sequence[Sequence[int]], count: int, known: dict[Coalition, Tensor]) -> Tensor:
    """What each unit's removal cost when its turn came: [units, items]."""
    lost: dict[int, Tensor] = {}
    for run in runs:
        for taken, unit in enumerate(run):
            lost[unit] = known[_without(count, run[:taken])] - known[_without(count, run[: taken + 1])]
    return torch.stack([lost[unit] for unit in range(count)])
