"""Intervals of importance hold as often as they say, with texts and orders drawn anew."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from sddx.importance.ablation import Shapley
from sddx.importance.coalitions import OfLogits
from sddx.importance.score import Subject, Sums
from sddx.importance.uncertainty import errors, membership, possible
from sddx.records import Batch, Units
from sddx.runtime import Runtime

pytestmark = pytest.mark.fast

UNITS, POPULATION = 4, 5000
EVERY = list(itertools.product([True, False], repeat=UNITS))
PLACE = {coalition: number for number, coalition in enumerate(EVERY)}


class Worlds(OfLogits):
    """What every coalition is worth on every text of a population [coalitions, texts]; a text is its number."""

    def __init__(self, worth: torch.Tensor) -> None:
        super().__init__(sequences=None)
        self.worth = worth

    def of(self, subject: Subject, coalitions: Any) -> torch.Tensor:
        texts = torch.cat([batch.input_ids[:, 0] for batch in subject.batches])
        return self.worth[:, texts][[PLACE[coalition] for coalition in coalitions]]

    def subject(self, texts: int, dice: np.random.Generator) -> Subject:
        numbers = torch.from_numpy(dice.integers(0, self.worth.shape[1], texts))[:, None].expand(-1, 2)
        batch = Batch(numbers, torch.ones_like(numbers), numbers)
        return Subject(None, None, Units("blocks", UNITS), [batch], Runtime(quiet=True))


def world() -> torch.Tensor:
    """Minus the losses of coalitions without units of every kind. Unit 0 outweighs all others, by very unlike
    amounts on different texts; unit 1 varies over texts more than over orders; unit 2 over orders alone, because it
    is missed together with others; unit 3 over both."""
    dice = np.random.default_rng(1)
    absent = 1 - torch.tensor(EVERY).double()
    skewed, even = (
        torch.from_numpy(dice.exponential(1, POPULATION)),
        torch.from_numpy(dice.normal(1, 0.5, POPULATION)),
    )
    other = torch.from_numpy(dice.exponential(1, POPULATION))
    alone = torch.stack([skewed, 0.1 * even, 0.02 * torch.ones(POPULATION).double(), 0.1 * other])
    lost = absent @ alone
    for strength, together in (
        (0.1, (0, 2)),
        (0.06, (1, 2)),
        (0.3, (0, 2, 3)),
        (0.3 * other, (1, 2, 3)),
        (0.1 * even, (1, 3)),
    ):
        lost = lost + absent[:, together].prod(1)[:, None] * strength
    return -lost


def truth(worth: torch.Tensor, length: int) -> list[float]:
    """The value of each unit, by enumeration: over how many of its run went before it, and which."""
    mean = dict(zip(EVERY, worth.mean(1).tolist(), strict=True))
    sizes = [place for start in range(0, UNITS, length) for place in range(min(length, UNITS - start))]
    values = [0.0] * UNITS
    for unit, before in itertools.product(range(UNITS), sizes):
        rest = [other for other in range(UNITS) if other != unit]
        costs = []
        for lacking in itertools.combinations(rest, before):
            with_, without = ({*lacking}, {*lacking, unit})
            kept = [tuple(number not in lost for number in range(UNITS)) for lost in (with_, without)]
            costs.append(mean[kept[0]] - mean[kept[1]])
        values[unit] += sum(costs) / len(costs) / len(sizes)
    return values


def covered(metric: Any, true: list[float], texts: int = 64, times: int = 1000) -> np.ndarray:
    """The share of experiments in which each unit's interval holds the truth."""
    dice, held = np.random.default_rng(0), np.zeros(UNITS)
    for number in range(times):
        metric.seed = number
        found = metric.measure(metric.value.subject(texts, dice))
        off = np.abs(np.array(found["mean"]) - true)
        held += off <= np.array(found["half_width"]) + 1e-12
    return held / times


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_the_interval_of_shapley_holds_the_value_over_all_texts_and_orders(keep: float) -> None:
    """In 93 to 97 % of 1,000 experiments, for units of every kind, against enumeration."""
    value = Worlds(world())
    held = covered(Shapley(value=value, keep=keep), truth(value.worth, max(int((1 - keep) * UNITS), 1)))
    assert ((held >= 0.93) & (held <= 0.97)).all(), held


def parts(units: int = 3) -> dict[str, torch.Tensor]:
    """A crossed sample: the means by text and by pair of orders, units going together."""
    table = np.random.default_rng(2).normal(size=(9, 5, units)).cumsum(2) + np.arange(units)
    return {"texts": torch.from_numpy(table.mean(1)), "orders": torch.from_numpy(table.mean(0))}


def test_variances_of_crossed_sources_add_up_each_with_its_own_freedom() -> None:
    """Against numpy and scipy; for one source the interval is scipy's."""
    sources = parts()
    variances = {name: part.numpy().var(0, ddof=1) / len(part) for name, part in sources.items()}
    found = errors(sources)
    np.testing.assert_allclose(np.square(found["stderr"]), variances["texts"] + variances["orders"])
    np.testing.assert_allclose(np.square(found["stderr_of"]["orders"]), variances["orders"])
    reach = student.ppf(0.975, 8) ** 2 * variances["texts"] + student.ppf(0.975, 4) ** 2 * variances["orders"]
    np.testing.assert_allclose(np.square(found["half_width"]), reach)
    t = {"texts": student.ppf(0.975, 8), "orders": student.ppf(0.975, 4)}
    cochran = sum(t[name] * each for name, each in variances.items()) / np.array(found["stderr"])
    assert (np.array(found["half_width"]) >= cochran).all()
    alone = errors({"texts": sources["texts"]})
    rows = sources["texts"].numpy()
    high = student.interval(0.95, 8, rows.mean(0), rows.std(0, ddof=1) / 3)[1]
    np.testing.assert_allclose(rows.mean(0) + alone["half_width"], high)
    assert errors({"texts": sources["texts"], "orders": sources["orders"][:1]})["stderr"] is None


def test_the_interval_out_of_sums_is_the_interval_out_of_parts() -> None:
    rows, sums = parts()["texts"], Sums()
    sums.add(rows[:4])
    sums.add(rows[4:])
    summary, found = sums.summary(), errors({"texts": rows})
    for name in ("stderr", "half_width"):
        np.testing.assert_allclose(summary[name], found[name])


def test_possible_scores_are_those_of_the_interval_and_move_together() -> None:
    """Their quantiles reach as far as the interval, and their correlations are those of the sources."""
    sources = {name: part.repeat(4, 1) for name, part in parts().items()}
    drawn = possible(sources, 0).numpy()
    np.testing.assert_allclose(
        np.quantile(drawn, 0.975, 0) - drawn.mean(0), errors(sources)["half_width"], rtol=0.1
    )
    expected = sum(np.cov(part.numpy().T) / len(part) for part in sources.values())
    np.testing.assert_allclose(
        np.corrcoef(drawn.T), expected / np.sqrt(np.outer(*[expected.diagonal()] * 2)), atol=0.05
    )


def test_what_all_units_share_does_not_hide_which_is_lowest() -> None:
    """The level of the loss moves with the texts, the difference between two units does not."""
    level = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 1)))
    sources = {
        "texts": level + torch.tensor([0.0, 0.1]),
        "orders": torch.zeros(16, 2).double() + torch.tensor([0.0, 0.1]),
    }
    assert membership(sources, 1, 0) == 1 and errors(sources)["stderr"][0] > 0.1


def test_units_that_only_texts_could_tell_apart_are_not_known() -> None:
    """Each unit costs the same in every order: by orders alone the lowest would be known at once."""
    worth = -(1 - torch.tensor(EVERY).double()) @ torch.from_numpy(
        np.random.default_rng(0).normal(1, 1, (UNITS, POPULATION))
    )
    value = Worlds(worth)
    found = Shapley(value=value, keep=0.0, orders=32, lowest=1).measure(value.subject(64, np.random.default_rng(3)))
    assert max(found["stderr_of"]["orders"]) < 1e-12 and found["stable"] < 0.95 and found["orders"] == 32
