"""The scaling law: recovery as a function of training examples, fitted only where the data supports it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sddx.report.curves import Run

SIZES, FOR_INTERVAL = 4, (5, 3)  # sizes for a fit; sizes and seeds for an interval (science: no fewer)
REACH = 2.0  # times the largest size: no prediction beyond
RESAMPLES = 400
Curve = dict[float, float]  # examples -> recovery, of one seed


@dataclass(frozen=True)
class Law:
    """recovery(n) = ceiling - drop * (n / first) ** -rate, with `first` the smallest size. `samples` are the same
    three parameters fitted to resampled seed-curves; none where the data does not carry an interval."""

    ceiling: float
    drop: float
    rate: float
    first: float
    largest: float
    samples: tuple[tuple[float, float, float], ...] = ()

    def examples(self, recovery: float) -> float | None:
        """Examples at which the curve reaches a recovery; None above its ceiling."""
        return _reached((self.ceiling, self.drop, self.rate), recovery, self.first)

    def predict(self, recovery: float) -> str:
        """The examples that a recovery takes, in words, with a 95 % interval over resampled seed-curves where
        there is one; or why that is not said."""
        needed = self.examples(recovery)
        if needed is None:
            return f"never: the fitted ceiling is {100 * self.ceiling:.1f} %"
        if needed > REACH * self.largest:
            return f"more than {REACH * self.largest:,.0f}: beyond twice the largest size nothing is predicted"
        if needed < self.first:
            return f"fewer than the smallest size, {self.first:,.0f}"
        if not self.samples:
            return f"{needed:,.0f} (no interval: that takes {FOR_INTERVAL[0]} sizes and {FOR_INTERVAL[1]} seeds)"
        resampled = [_reached(sample, recovery, self.first) for sample in self.samples]
        low, high = np.quantile([np.inf if n is None else n for n in resampled], [0.025, 0.975], method="nearest")
        top = f"{high:,.0f}" if high <= REACH * self.largest else f"more than {REACH * self.largest:,.0f}"
        return f"{needed:,.0f} ({low:,.0f} to {top})"


def _reached(law: tuple[float, float, float], recovery: float, first: float) -> float | None:
    ceiling, drop, rate = law
    if recovery >= ceiling:
        return None
    with np.errstate(over="ignore"):
        return float(first * np.float64(drop / (ceiling - recovery)) ** (1 / rate))


def seed_curves(runs: Sequence[Run], measure: str) -> list[Curve]:
    """One curve a seed, over training examples."""
    curves: dict[int, Curve] = defaultdict(dict)
    for run in runs:
        if run.get(measure) is not None:
            curves[run["choices"]["seed"]][run["choices"]["size"]] = run[measure]
    return list(curves.values())


def fit(curves: Sequence[Curve], seed: int = 0) -> Law | str:
    """The law of some seed-curves, or in words why there is none. Whole curves are resampled for the interval,
    because the points of one are not independent."""
    sizes = sorted({size for curve in curves for size in curve})
    if len(sizes) < SIZES:
        return f"no law: {len(sizes)} sizes, and a fit of three parameters takes at least {SIZES}"
    whole = [curve for curve in curves if set(curve) == set(sizes)]
    if not whole:
        return "no law: no seed was run at every size"
    parameters = _fitted(whole, sizes)
    if parameters is None:
        return "no law: recovery does not rise with the number of examples and level off"
    samples: list[tuple[float, float, float]] = []
    if len(sizes) >= FOR_INTERVAL[0] and len(whole) >= FOR_INTERVAL[1]:
        dice = np.random.default_rng(seed)
        draws = [dice.integers(len(whole), size=len(whole)) for _ in range(RESAMPLES)]
        refits = [_fitted([whole[at] for at in draw], sizes) for draw in draws]
        if sum(refit is None for refit in refits) > 0.05 * RESAMPLES:
            return "no law: it does not hold in one of twenty resamplings of the seeds"
        samples = [refit for refit in refits if refit is not None]
    return Law(*parameters, first=sizes[0], largest=sizes[-1], samples=tuple(samples))


def _fitted(curves: Sequence[Curve], sizes: Sequence[float]) -> tuple[float, float, float] | None:
    """(ceiling, drop, rate) by least squares over the mean curve; None where it does not rise, or where the
    best ceiling or rate lies at the edge of what is sensible, so that the data does not tell it."""
    from scipy.optimize import curve_fit

    x = np.array(sizes) / sizes[0]
    y = np.array([np.mean([curve[size] for curve in curves]) for size in sizes])
    if y[-1] <= y[0]:
        return None
    low, high, top = 0.05, 5.0, 1.1  # a student that ends a tenth above the unpruned model is no finding of sizes
    try:
        best, _ = curve_fit(
            lambda n, ceiling, drop, rate: ceiling - drop * n**-rate, x, y,
            p0=(y[-1], y[-1] - y[0], 0.5), bounds=([0, 0, low], [top, 2, high]), maxfev=5000,
        )  # fmt: skip
    except RuntimeError:
        return None
    ceiling, drop, rate = (float(value) for value in best)
    inside = low * 1.01 < rate < high * 0.99 and ceiling < 0.99 * top and drop > 0
    return (ceiling, drop, rate) if inside else None
