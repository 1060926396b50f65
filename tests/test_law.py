"""The scaling law: what made the data is found again, and data that carries no law is refused in words."""

from __future__ import annotations

import numpy as np
import pytest

from sddx.report.law import Law, fit

pytestmark = pytest.mark.fast

SIZES = (256, 512, 1024, 2048, 4096)


def curves(seeds: int, noise: float = 0.0, *, sizes=SIZES, ceiling=0.95, drop=0.3, rate=0.6) -> list[dict]:
    dice = np.random.default_rng(0)
    means = {size: ceiling - drop * (size / 256) ** -rate for size in sizes}
    return [{size: mean + noise * dice.standard_normal() for size, mean in means.items()} for _ in range(seeds)]


def test_the_law_that_made_the_data_is_found() -> None:
    law = fit(curves(3))
    assert isinstance(law, Law)
    assert (law.ceiling, law.drop, law.rate) == pytest.approx((0.95, 0.3, 0.6), abs=1e-3)
    assert law.examples(0.85) == pytest.approx(256 * 3 ** (1 / 0.6), rel=0.01)
    assert law.examples(0.96) is None


def test_the_interval_holds_the_truth_and_needs_five_sizes_and_three_seeds() -> None:
    law = fit(curves(5, 0.003))
    assert isinstance(law, Law) and len(law.samples) > 350
    low, high = np.quantile([sample[0] for sample in law.samples], [0.025, 0.975])
    assert low < 0.95 < high
    for few in (curves(2, 0.003), curves(5, 0.003, sizes=SIZES[:4])):
        found = fit(few)
        assert isinstance(found, Law) and not found.samples and "no interval" in found.predict(0.75)


def test_nothing_is_predicted_beyond_twice_the_largest_size() -> None:
    law = fit(curves(3))
    assert isinstance(law, Law)
    assert law.examples(0.9405) > 2 * 4096 and "beyond twice" in law.predict(0.9405)
    assert "never" in law.predict(0.96) and "fewer" in law.predict(0.6)
    assert law.predict(0.85).startswith("1,5")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (curves(3, sizes=SIZES[:3]), "3 sizes"),
        (curves(3, drop=-0.1), "does not rise"),
        (curves(3, drop=0.0), "does not rise"),
        ([{256: 0.6, 512: 0.7, 1024: 0.8, 2048: 0.9, 4096: 1.0}] * 3, "level off"),
        ([{256: 0.6, 512: 0.7}, {1024: 0.8, 2048: 0.9}], "every size"),
    ],
)
def test_data_without_a_law_is_refused(data: list[dict], why: str) -> None:
    found = fit(data)
    assert isinstance(found, str) and why in found
