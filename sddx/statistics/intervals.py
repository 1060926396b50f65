"""Uncertainty of scores, recoveries and differences (docs/science.md, "Uncertainty"). numpy and scipy only.

`Scores` are per-item scores by task, in the same order of items for every model that is compared. An average
over tasks is a macro average: every reported task counts once, whatever its number of items. Where items share a
passage or another source, `Clusters` name it for each item of a task: such items are drawn together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Scores = Mapping[str, Sequence[float]]
Clusters = Mapping[str, Sequence[Hashable] | None]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval. `contains` says which uncertainty is in it: "items", "seeds", "seeds and
    items", or "draws" (of what was cut)."""

    estimate: float
    low: float
    high: float
    contains: str
    level: float = 0.95

    @property
    def half_width(self) -> float:
        """Half the distance between the bounds."""
        return (self.high - self.low) / 2


def standard_error(scores: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float | None:
    """Standard error of a task's mean: sample standard deviation (n - 1) / sqrt(n). None for one item.

    With `clusters` (one for each item) that of a ratio of sums over g clusters, by linearisation (Cochran 1977,
    chapter 6): sqrt(g / (g - 1) sum over clusters of (sum of score - mean)^2) / n. None for one cluster.
    """
    items = np.asarray(scores, dtype=float)
    if clusters is None:
        return float(items.std(ddof=1) / np.sqrt(len(items))) if len(items) > 1 else None
    off = np.bincount(_numbered(clusters), weights=items - items.mean())
    count = len(off)
    return float(np.sqrt(count / (count - 1) * (off**2).sum()) / len(items)) if count > 1 else None


def _numbered(clusters: Sequence[Hashable]) -> list[int]:
    """Each item's cluster as a number from 0 on."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]


def independent(clusters: Sequence[Hashable]) -> float:
    """How many independent items are as sure as these at least, if those of a cluster all score alike: n^2 over the
    sum of the clusters' squared sizes (Kish 1965). Their number where each is a cluster by itself."""
    sizes = Counter(clusters).values()
    return sum(sizes) ** 2 / sum(size**2 for size in sizes)


def task_weights(tasks: Sequence[str], part_of: Mapping[str, str] | None = None) -> dict[str, float]:
    """Weight of each task in the macro average; the weights add up to 1.

    `part_of` names the reported task that a task belongs to (MMLU for its 57 subjects): reported tasks count
    equally, and so do the parts within one. A task that it does not name is reported itself.
    """
    reported = {task: (part_of or {}).get(task, task) for task in tasks}
    parts = Counter(reported.values())
    return {task: 1 / (len(parts) * parts[reported[task]]) for task in tasks}


def macro_average(scores: Scores, weights: Mapping[str, float] | None = None) -> float:
    """Weighted mean of the tasks' mean scores (equal weights by default)."""
    weights = weights or task_weights(list(scores))
    return float(sum(weights[task] * np.mean(items) for task, items in scores.items()))


def resample(
    models: Sequence[Scores],
    *,
    weights: Mapping[str, float] | None = None,
    clusters: Clusters | None = None,
    replicates: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Macro averages [models, replicates] over resampled items.

    Items are resampled with replacement within their task, the same items for every model (docs/science.md,
    "Uncertainty"); where a task has `clusters`, whole ones are drawn, and its mean is over the items that came with
    them. Tasks of one item are joined as `_strata` says. Raises ValueError where the models were not scored on the
    same tasks and numbers of items.
    """
    _same_items(models)
    weights = weights or task_weights(list(models[0]))
    generator = np.random.default_rng(seed)
    averages = np.zeros((len(models), replicates))
    for tasks in _strata(models[0], weights):
        items = np.array([np.concatenate([model[task] for task in tasks]) for model in models], dtype=float)
        units = _units(items, (clusters or {}).get(tasks[0]) if len(tasks) == 1 else None)
        # Units on which all models score alike are interchangeable, so it is enough to draw how often each
        # combination of scores occurs: the same distribution, and for binary scores a handful of columns.
        combinations, counts = np.unique(units, axis=1, return_counts=True)
        total = counts.sum()
        drawn = generator.multinomial(total, counts / total, size=replicates)
        sums, sizes = combinations[:-1] @ drawn.T, combinations[-1] @ drawn.T
        averages += sum(weights[task] for task in tasks) * sums / sizes
    return averages


def _units(items: np.ndarray, clusters: Sequence[Hashable] | None) -> np.ndarray:
    """What is drawn, [models + 1, units]: the sums of the models' scores [models, items] over each cluster, and how
    many items it has."""
    rows = [*items, np.ones(items.shape[1])]
    if clusters is None:
        return np.array(rows)
    numbers = _numbered(clusters)
    return np.array([np.bincount(numbers, weights=row) for row in rows])


def _strata(scores: Scores, weights: Mapping[str, float]) -> list[list[str]]:
    """The tasks whose items are drawn together: each by itself, but those of one item joined where they weigh the
    same, as the parts of a reported task do. An item by itself would be drawn every time and show no doubt;
    together they vary between tasks too, so that the interval is too wide if anything."""
    strata: dict[str | float, list[str]] = {}
    for task, items in scores.items():
        strata.setdefault(weights[task] if len(items) == 1 else task, []).append(task)
    return list(strata.values())


def _same_items(models: Sequence[Scores]) -> None:
    for model in models[1:]:
        if model.keys() != models[0].keys():
            raise ValueError(f"models were scored on other tasks: {sorted(model)} and {sorted(models[0])}")
        for task, items in model.items():
            if len(items) != len(models[0][task]):
                raise ValueError(f"{task}: {len(items)} and {len(models[0][task])} items; pairs are needed")


def ratio_interval(
    model: Scores,
    reference: Scores,
    *,
    weights: Mapping[str, float] | None = None,
    clusters: Clusters | None = None,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> Interval:
    """Ratio of macro averages, model / reference, recomputed in each replicate; percentile interval.

    With the unpruned model as reference this is the recovery. NaN where the reference scores nothing.
    """
    drawn = {"replicates": replicates, "seed": seed}
    averages = resample([model, reference], weights=weights, clusters=clusters, **drawn)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = averages[0] / averages[1]
        estimate = np.float64(macro_average(model, weights)) / macro_average(reference, weights)
    low, high = _percentiles(ratios, level)
    return Interval(float(estimate), low, high, "items", level)


def paired_difference(
    first: Sequence[Scores],
    second: Sequence[Scores],
    *,
    weights: Mapping[str, float] | None = None,
    clusters: Clusters | None = None,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> Interval:
    """Difference of macro averages, first - second, of two arms on the same items and the same seeds.

    `first[k]` and `second[k]` are the scores under training seed k. One seed: item bootstrap. More: the
    t(k - 1) interval of the per-seed differences, never a bootstrap over seeds (docs/science.md, "Uncertainty").
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"pairs of seeds are needed, not {len(first)} and {len(second)} runs")
    _same_items([*first, *second])
    pairs = zip(first, second, strict=True)
    differences = [macro_average(a, weights) - macro_average(b, weights) for a, b in pairs]
    if len(first) > 1:
        return t_interval(differences, level=level)
    drawn = {"replicates": replicates, "seed": seed}
    averages = resample([first[0], second[0]], weights=weights, clusters=clusters, **drawn)
    low, high = _percentiles(averages[0] - averages[1], level)
    return Interval(differences[0], low, high, "items", level)


def crossed_difference(
    first: Sequence[Scores],
    second: Sequence[Scores],
    *,
    weights: Mapping[str, float] | None = None,
    clusters: Clusters | None = None,
    level: float = 0.95,
) -> Interval:
    """As `paired_difference` over two seeds or more, for other items as well as other seeds: every seed was judged
    on the same items, so that what varies over items does not average out over seeds.

    Of two crossed random effects, the seeds' variance with Student's t, as there are few of them, and beside it
    that of the items (or their clusters), without what is neither a seed's nor an item's: never narrower than
    `paired_difference`. Raises ValueError below two seeds, and for a task of one cluster.
    """
    from scipy.special import stdtrit

    weights = weights or task_weights(list(first[0]))
    parts = [_deviations(first, second, task, weights[task]) for task in first[0]]
    together = [(clusters or {}).get(task) or range(len(items)) for task, items in first[0].items()]
    groups = [_numbered(those) for those in together]
    counts = [max(numbers) + 1 for numbers in groups]
    if len(first) < 2 or min(counts) < 2:
        raise ValueError("an interval over seeds and items needs two seeds, and two items or clusters a task")
    seeds = paired_difference(first, second, weights=weights, level=level)
    items = max(0.0, sum(_of_items(part, numbers) for part, numbers in zip(parts, groups, strict=True)))
    of_items = float(stdtrit(sum(counts) - len(counts), (1 + level) / 2)) * math.sqrt(items)
    half = math.hypot(seeds.half_width, of_items)
    return Interval(seeds.estimate, seeds.estimate - half, seeds.estimate + half, "seeds and items", level)


def _deviations(first: Sequence[Scores], second: Sequence[Scores], task: str, weight: float) -> np.ndarray:
    """What each seed and item adds to the difference beyond its mean, [seeds, items]: all of them sum to 0."""
    found = np.array([np.subtract(a[task], b[task]) for a, b in zip(first, second, strict=True)], dtype=float)
    return weight * (found - found.mean()) / found.size


def _of_items(parts: np.ndarray, numbers: Sequence[int]) -> float:
    """The variance that the items of a task, in clusters of these numbers, add to the sum of all parts, less what
    is neither theirs nor the seeds'."""
    seeds, count = len(parts), max(numbers) + 1
    rest = parts - parts.mean(0) - parts.mean(1, keepdims=True)
    neither = np.sum([np.bincount(numbers, weights=row) ** 2 for row in rest])
    both = np.sum(np.bincount(numbers, weights=parts.sum(0)) ** 2)
    return float(count / (count - 1) * (both - seeds / (seeds - 1) * neither))


def expected_half_width(
    items: Mapping[str, float], part_of: Mapping[str, str] | None = None, *, p: float = 0.5, level: float = 0.95
) -> dict[str, float]:
    """Half-width of the interval to expect from so many `items` by task: of each reported task's score, of the
    macro average (under "average"), and of a recovery near 1 (under "recovery"), all as fractions.

    Binomial variance p (1 - p) / n: no score between 0 and 1 varies more at a mean of p, and at none more than
    at p = 0.5. A recovery is the ratio of two averages near p, whose relative variances add up to first order;
    this takes them as independent, and models that fail on the same items do better.
    """
    from scipy.special import ndtri

    z = float(ndtri((1 + level) / 2))
    variances = {task: p * (1 - p) / count for task, count in items.items()}
    weights = task_weights(list(items), part_of)
    reported = {task: (part_of or {}).get(task, task) for task in items}
    summed = dict.fromkeys(reported.values(), 0.0)
    for task, variance in variances.items():
        summed[reported[task]] += weights[task] ** 2 * variance
    average = z * math.sqrt(sum(summed.values()))
    # A reported task's share of the average is its score over their number.
    alone = {name: z * len(summed) * math.sqrt(variance) for name, variance in summed.items()}
    return {**alone, "average": average, "recovery": math.sqrt(2) * average / p}


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def t_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean over k seeds with the t(k - 1) interval. Raises ValueError below two seeds."""
    from scipy.special import stdtrit

    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least two, not {len(values)}")
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * error
    return Interval(mean, mean - half, mean + half, "seeds", level)


def rank_correlation(
    first: Sequence[float], second: Sequence[float], *, free: int | None = None, level: float = 0.95
) -> Interval:
    """Spearman's correlation of pairs, of which so many were drawn independently (`free`; None: all), with the
    interval of its Fisher transform (variance after Bonett and Wright, Psychometrika 2000); 0 where one of them
    ranks nothing. Raises ValueError below four such pairs."""
    from scipy.special import ndtri
    from scipy.stats import spearmanr  # which takes as long to import as all else here

    free = len(first) if free is None else free
    if free < 4:
        raise ValueError(f"an interval of a rank correlation needs at least four pairs, not {free}")
    varies = len(set(first)) > 1 and len(set(second)) > 1
    rho = float(spearmanr(first, second).statistic) if varies else 0.0
    half = float(ndtri((1 + level) / 2)) * np.sqrt((1 + rho**2 / 2) / (free - 3))
    middle = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12))
    return Interval(rho, float(np.tanh(middle - half)), float(np.tanh(middle + half)), "draws", level)


def flips(before: Sequence[float], after: Sequence[float]) -> tuple[int, int]:
    """Items that flipped: (right before and wrong after, wrong before and right after).

    Raises ValueError for scores other than 0 and 1, where right and wrong are not defined.
    """
    if len(before) != len(after):
        raise ValueError(f"pairs are needed, not {len(before)} and {len(after)} items")
    if not (binary(before) and binary(after)):
        raise ValueError("right and wrong are defined for scores of 0 and 1 only")
    right_before, right_after = np.asarray(before) == 1, np.asarray(after) == 1
    return int((right_before & ~right_after).sum()), int((~right_before & right_after).sum())


def binary(scores: Sequence[float]) -> bool:
    """Whether every score is 0 or 1."""
    return bool(np.isin(np.asarray(scores), (0, 1)).all())


def mcnemar(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided p of McNemar's exact test: the flips against a fair coin (McNemar 1947, exact binomial form).

    For one task and one seed; binary scores only (ValueError otherwise).
    """
    from scipy.special import bdtr

    lost, won = flips(before, after)
    return min(1.0, 2 * float(bdtr(min(lost, won), lost + won, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for several claims by Holm's step-down rule (Holm 1979), in the given order."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()
