"""Laws of the intervals and tests, and of the recoveries that are made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from sddx.evaluation.recovery import reported_chance, summarise
from sddx.report import table
from sddx.statistics import intervals as statistics
from sddx.statistics.intervals import (
    crossed_difference,
    flips,
    holm,
    mcnemar,
    paired_difference,
    rank_correlation,
    ratio_interval,
    t_interval,
)

pytestmark = pytest.mark.fast

WRONG, RIGHT = 0.0, 1.0


def simulated(seed: int, tasks: int = 2, items: int = 150) -> tuple[dict, dict]:
    """Correlated binary scores of two models: P(first right) = 0.8, P(second right | first) = 0.8 or 0.3."""
    generator = np.random.default_rng(seed)
    first, second = {}, {}
    for task in range(tasks):
        right = generator.random(items) < 0.8
        first[str(task)] = right.astype(float)
        second[str(task)] = (generator.random(items) < np.where(right, 0.8, 0.3)).astype(float)
    return first, second


TRUE_SECOND = 0.8 * 0.8 + 0.2 * 0.3


def test_coverage_of_the_recovery_and_of_the_paired_difference() -> None:
    """A 95 % interval holds the truth in 93 to 97 % of simulated experiments."""
    ratios, differences = 0, 0
    for seed in range(1000):
        first, second = simulated(seed)
        ratio = ratio_interval(second, first, replicates=300, seed=seed)
        paired = paired_difference([second], [first], replicates=300, seed=seed)
        ratios += ratio.low <= TRUE_SECOND / 0.8 <= ratio.high
        differences += paired.low <= TRUE_SECOND - 0.8 <= paired.high
    assert 930 <= ratios <= 970
    assert 930 <= differences <= 970


def in_clusters(seed: int, groups: int = 150) -> tuple[list[int], dict, dict]:
    """Binary scores of two models on groups of one to five items, whose difficulty, and what the second model loses
    on it, are shared: P(right) = Phi(0.8 / sqrt(1 + 1.2^2)) and Phi(0.5 / sqrt(1 + 1.2^2 + 0.8^2))."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 6, groups)
    ability, lost = (np.repeat(generator.normal(*of, groups), sizes) for of in ((0.8, 1.2), (-0.3, 0.8)))
    noise = generator.normal(0, 1, (2, len(ability)))
    scores = [(value > 0).astype(float) for value in (ability + noise[0], ability + lost + noise[1])]
    return np.repeat(np.arange(groups), sizes).tolist(), *({"t": each} for each in scores)


def test_coverage_where_items_share_a_passage() -> None:
    """Resampled by cluster, 95 % intervals and 1.96 standard errors hold the truth in 93 to 97 % of experiments;
    taking the items as independent claims too much."""
    truth = stats.norm.cdf([0.8 / np.sqrt(2.44), 0.5 / np.sqrt(3.08)])
    held = np.zeros((2, 3))
    for seed in range(1000):
        shared, first, second = in_clusters(seed)
        for row, clusters in enumerate(({"t": shared}, {"t": None})):
            drawn = {"clusters": clusters, "replicates": 300, "seed": seed}
            ratio = ratio_interval(second, first, **drawn)
            paired = paired_difference([second], [first], **drawn)
            error = statistics.standard_error(first["t"], clusters["t"])
            held[row] += (
                ratio.low <= truth[1] / truth[0] <= ratio.high,
                paired.low <= truth[1] - truth[0] <= paired.high,
                abs(np.mean(first["t"]) - truth[0]) <= 1.96 * error,
            )
    assert (held[0] >= 930).all() and (held[0] <= 970).all()
    assert (held[1] < 930).all()


def test_clusters_of_one_item_are_items() -> None:
    """The same draws and the same error, to the bit; and as many independent items as there are."""
    first, second = simulated(0)
    alone = {task: list(range(len(scores))) for task, scores in first.items()}
    assert ratio_interval(second, first, clusters=alone) == ratio_interval(second, first)
    for scores in first.values():
        plain = statistics.standard_error(scores)
        assert statistics.standard_error(scores, range(len(scores))) == pytest.approx(plain, rel=1e-12)
    assert statistics.independent("abcd") == 4


def test_clusters_by_hand() -> None:
    """Copies of an item are no evidence; unequal clusters are a ratio of sums; one cluster shows no doubt."""
    scores, copied = [1.0, 0.0, 1.0, 1.0], np.repeat([1.0, 0.0, 1.0, 1.0], 3)
    numbers = np.repeat(range(4), 3).tolist()
    assert statistics.standard_error(copied, numbers) == pytest.approx(statistics.standard_error(scores))
    assert statistics.independent(numbers) == 4 and statistics.independent("aab") == 9 / 5
    off = np.array([2 - 2 * 0.75, 0 + 1 - 2 * 0.75])
    assert statistics.standard_error([1, 1, 0, 1], "aabb") == pytest.approx(np.sqrt(2 * (off**2).sum()) / 4)
    assert statistics.standard_error([1, 0, 1], "aaa") is None
    generator = np.random.default_rng(0)
    sums, sizes = np.array([2.0, 0.0, 1.0]), np.array([2, 1, 3])
    drawn = generator.integers(0, 3, size=(20000, 3))
    plain = sums[drawn].sum(1) / sizes[drawn].sum(1)
    ours = statistics.resample([{"t": [1, 1, 0, 1, 0, 0]}], clusters={"t": "aabccc"}, replicates=20000)[0]
    assert (ours.mean(), ours.std()) == pytest.approx((plain.mean(), plain.std()), abs=4e-3)


def test_what_stands_apart_is_in_no_average() -> None:
    """It has its score and its error; averages, recoveries and the closed gap are those without it."""
    first, second = simulated(0, tasks=3)
    models = {"unpruned": first, "pruned": {task: [0.0] * 150 for task in first}, "recovered": second}
    without = {model: {task: scores[task] for task in ("0", "1")} for model, scores in models.items()}
    given = {"trained": ["0", "2"], "replicates": 50}
    found = summarise(models, chance=dict.fromkeys("012", 0.1), apart=["2"], **given)
    expected = summarise(without, chance=dict.fromkeys("01", 0.1), **given)
    same = expected.keys() - {"scores", "standard_errors", "apart", "trained", "flipped"}
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    for kind in ("scores", "standard_errors"):
        for model, by_task in found[kind].items():
            assert {task: by_task[task] for task in ("0", "1", "average")} == expected[kind][model] and by_task[
                "2"
            ] >= 0
    assert found["apart"] == ["2"] and found["trained"] == ["0", "2"]


def test_coverage_of_rank_correlations() -> None:
    """Of twenty pairs, normal with correlation r, whose rank correlation is 6 / pi asin(r / 2)."""
    draw = np.random.default_rng(0)
    for r in (0.0, 0.6):
        truth, held = 6 / np.pi * np.arcsin(r / 2), 0
        for _ in range(1000):
            x, noise = draw.normal(size=(2, 20))
            interval = rank_correlation(x.tolist(), (r * x + np.sqrt(1 - r**2) * noise).tolist())
            held += interval.low <= truth <= interval.high
        assert 0.93 <= held / 1000 <= 0.97
    with pytest.raises(ValueError, match="at least four pairs"):
        rank_correlation([1, 2, 3], [1, 2, 3])


def test_coverage_over_seeds() -> None:
    """The t interval of three seeds' differences holds the true difference in 93 to 97 % of experiments."""
    draws = np.random.default_rng(0).normal(0.02, 0.01, size=(2000, 3))
    held = sum(interval.low <= 0.02 <= interval.high for interval in map(t_interval, draws.tolist()))
    assert 1860 <= held <= 1940


def crossed(seed: int, over_seeds: float, over_items: float, seeds: int = 5) -> tuple[list[dict], list[dict]]:
    """Two arms of some seeds on the same items of two tasks. The first is 0.1 better, and how much so varies over
    seeds, over items and beyond."""
    generator = np.random.default_rng(seed)
    shift = generator.normal(0.1, over_seeds, seeds)
    difficulty = {"a": generator.normal(0, over_items, 80), "b": generator.normal(0, over_items, 120)}
    first = [{task: s + i + generator.normal(0, 0.3, len(i)) for task, i in difficulty.items()} for s in shift]
    return first, [{task: np.zeros(len(i)) for task, i in difficulty.items()} for _ in shift]


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("over_seeds", "over_items"), [(0.05, 0.1), (0.02, 0.5), (0.1, 0.5), (0.05, 0.0)])
def test_coverage_over_seeds_and_items(over_seeds: float, over_items: float, seeds: int) -> None:
    """Both vary in an experiment done again: the interval holds the truth in 93 % of them at least, and in 97 % at
    most where one of the two says nearly all; where both speak it may be too wide, as each has its own quantile."""
    experiments = [crossed(seed, over_seeds, over_items, seeds) for seed in range(500)]
    intervals = [crossed_difference(*experiment) for experiment in experiments]
    held = sum(interval.low <= 0.1 <= interval.high for interval in intervals) / len(intervals)
    assert 0.93 <= held <= (0.97 if over_items == 0 else 1)
    over_seeds_alone = [paired_difference(*experiment).half_width for experiment in experiments]
    assert all(both.half_width >= alone - 1e-12 for both, alone in zip(intervals, over_seeds_alone, strict=True))


def test_over_seeds_alone_items_that_all_seeds_share_are_not_in_doubt() -> None:
    """So the interval over both is the wider one where items differ, and the t interval's where they do not."""
    first, second = crossed(0, 0.05, 0.5)
    assert crossed_difference(first, second).half_width > 1.5 * paired_difference(first, second).half_width
    level = [{"a": [shift] * 3} for shift in (0.1, 0.2, 0.4)]
    zero = [{"a": [0.0] * 3}] * 3
    both, seeds = crossed_difference(level, zero), paired_difference(level, zero)
    assert both.half_width == pytest.approx(seeds.half_width)
    assert both.estimate == pytest.approx(seeds.estimate)


def test_items_of_one_passage_count_as_one_over_seeds_and_items() -> None:
    """Every item four times, as a cluster: as sure as once."""
    first, second = crossed(1, 0.05, 0.5)
    fourfold = [[{task: np.repeat(v, 4) for task, v in run.items()} for run in arm] for arm in (first, second)]
    clusters = {task: np.repeat(np.arange(len(v)), 4).tolist() for task, v in first[0].items()}
    once, grouped = crossed_difference(first, second), crossed_difference(*fourfold, clusters=clusters)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high))


def test_what_seeds_add_to_a_large_passage_is_not_taken_for_its_own() -> None:
    """One of 81 passages has a fifth of the items: coverage as elsewhere, though seeds move it by more."""
    sizes, held = [20, *[1] * 80], 0
    clusters = {"a": np.repeat(range(81), sizes).tolist()}
    for seed in range(500):
        generator = np.random.default_rng(seed)
        items = np.repeat(generator.normal(0, 0.1, 81), sizes)
        first = [
            {"a": 0.1 + shift + items + generator.normal(0, 0.3, 100)} for shift in generator.normal(0, 0.05, 5)
        ]
        found = crossed_difference(first, [{"a": np.zeros(100)}] * 5, clusters=clusters)
        held += found.low <= 0.1 <= found.high
    assert held >= 465


def test_an_interval_over_seeds_and_items_needs_two_of_either() -> None:
    for runs in ([{"a": [1, 0]}], [{"a": [1]}, {"a": [0]}]):
        with pytest.raises(ValueError, match="two"):
            crossed_difference(runs, runs)


@pytest.mark.parametrize("p", [0.5, 0.7])
def test_the_expected_half_width_is_what_simulated_models_show(p: float) -> None:
    """1.96 standard deviations of the scores, the average and the recovery of simulated pairs of models."""
    items, part_of = {"algebra": 60, "law": 90, "sums": 400}, {"algebra": "mmlu", "law": "mmlu"}
    generator = np.random.default_rng(0)
    first, second = ({task: generator.binomial(n, p, 20000) / n for task, n in items.items()} for _ in range(2))
    mmlu = (first["algebra"] + first["law"]) / 2
    average, other = (mmlu + first["sums"]) / 2, (second["algebra"] + second["law"]) / 4 + second["sums"] / 2
    shown = {"mmlu": mmlu, "sums": first["sums"], "average": average, "recovery": other / average}
    found = statistics.expected_half_width(items, part_of, p=p)
    assert found.keys() == shown.keys()
    for name, values in shown.items():
        assert found[name] == pytest.approx(stats.norm.ppf(0.975) * values.std(), rel=0.03), name


def test_no_scores_are_less_sure_than_the_expected_half_width() -> None:
    """p = 0.5 is the worst case: an interval over items is never wider, for binary scores or any from 0 to 1."""
    for scores in ([0.0, 1.0] * 50, [0.0] * 80 + [1.0] * 20, np.random.default_rng(0).random(100).tolist()):
        widest = statistics.expected_half_width({"t": len(scores)})["t"]
        assert 1.959 * np.std(scores) / np.sqrt(len(scores)) <= widest


def test_bootstrap_equals_drawing_items_one_by_one() -> None:
    """Drawing counts of score combinations has the distribution of drawing items: same mean and spread."""
    generator = np.random.default_rng(1)
    first, second = generator.random(40), generator.random(40)
    drawn = generator.integers(0, 40, size=(20000, 40))
    plain = np.array([first[drawn].mean(1), second[drawn].mean(1)])
    ours = statistics.resample([{"t": first}, {"t": second}], replicates=20000)
    assert ours.mean(1) == pytest.approx(plain.mean(1), abs=2e-3)
    assert np.cov(ours) == pytest.approx(np.cov(plain), rel=0.06, abs=3e-5)


def test_bootstrap_is_a_function_of_its_seed() -> None:
    """The same seed gives the same interval, bit for bit; another seed gives another."""
    first, second = simulated(0)
    assert ratio_interval(second, first, seed=3) == ratio_interval(second, first, seed=3)
    assert ratio_interval(second, first, seed=3) != ratio_interval(second, first, seed=4)


def test_a_model_recovers_itself_without_doubt() -> None:
    """The same items are drawn for both models, so a model against itself has recovery 1 throughout."""
    first, _ = simulated(0)
    interval = ratio_interval(first, first)
    assert (interval.estimate, interval.low, interval.high) == (1.0, 1.0, 1.0)
    assert paired_difference([first], [first]).half_width == 0


def test_pairs_are_refused_where_items_differ() -> None:
    """Other tasks, or another number of items, cannot be paired."""
    with pytest.raises(ValueError, match="other tasks"):
        ratio_interval({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(ValueError, match="3 and 2 items"):
        paired_difference([{"a": [1, 0]}], [{"a": [1, 0, 1]}])


def test_one_seed_contains_items_and_several_contain_seeds() -> None:
    """One seed is bootstrapped over items; from two on the interval is t(k - 1) of the seeds' differences."""
    runs = [simulated(seed) for seed in range(3)]
    one = paired_difference([runs[0][1]], [runs[0][0]])
    assert one.contains == "items" and one.low < one.estimate < one.high
    several = paired_difference([second for _, second in runs], [first for first, _ in runs])
    differences = [np.mean([*second.values()]) - np.mean([*first.values()]) for first, second in runs]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(differences), scale=stats.sem(differences))
    assert several.contains == "seeds"
    assert (several.low, several.high) == pytest.approx((low, high))
    with pytest.raises(ValueError, match="at least two"):
        t_interval([0.1])


def test_macro_average_counts_reported_tasks_equally() -> None:
    """Two parts of one reported task weigh a quarter each beside one other task, whatever their items."""
    weights = statistics.task_weights(["algebra", "law", "sums"], {"algebra": "mmlu", "law": "mmlu"})
    assert weights == {"algebra": 0.25, "law": 0.25, "sums": 0.5}
    scores = {"algebra": [1, 1, 1, 1], "law": [0], "sums": [1, 0]}
    assert statistics.macro_average(scores, weights) == 0.25 + 0 + 0.25
    assert statistics.macro_average(scores) == pytest.approx((1 + 0 + 0.5) / 3)


def test_standard_error_by_hand() -> None:
    """Sample standard deviation over the root of n; not defined for one item."""
    assert statistics.standard_error([1, 0, 1, 1]) == pytest.approx(stats.sem([1, 0, 1, 1]))
    assert statistics.standard_error([1]) is None


@pytest.mark.parametrize("lost, won", [(0, 0), (1, 0), (3, 9), (10, 10), (0, 6)])
def test_mcnemar_is_the_binomial_test_of_the_flips(lost: int, won: int) -> None:
    """Equal to scipy's exact binomial test of the discordant pairs, and 1 where nothing flipped."""
    before = [RIGHT] * lost + [WRONG] * won + [RIGHT, WRONG]
    after = [WRONG] * lost + [RIGHT] * won + [RIGHT, WRONG]
    assert flips(before, after) == (lost, won)
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar(before, after) == pytest.approx(expected)


def test_mcnemar_refuses_scores_that_are_not_binary() -> None:
    """Half right is neither right nor wrong."""
    with pytest.raises(ValueError, match="0 and 1 only"):
        mcnemar([0.5, 1], [1, 0])


def test_holm_by_hand() -> None:
    """Sorted p times 4, 3, 2, 1, never falling and never above 1, given back in the caller's order."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


MODELS = {
    "unpruned": {"sums": [1, 1, 1, 1], "facts": [1, 1, 0, 1]},
    "pruned": {"sums": [0, 0, 0, 1], "facts": [1, 0, 1, 0]},
    "recovered": {"sums": [1, 1, 0, 1], "facts": [1, 0, 1, 0]},
}


def test_recoveries_by_hand() -> None:
    """Averages are 7/8, 3/8 and 5/8: every ratio follows."""
    found = summarise(MODELS, chance={"sums": 0.0, "facts": 0.25}, trained=["sums"])
    assert found["scores"]["recovered"] == {"sums": 0.75, "facts": 0.5, "average": 0.625}
    assert found["recovery"] == pytest.approx(5 / 7)
    assert found["recovery_low"] <= 5 / 7 <= found["recovery_high"]
    assert found["pruned_recovery"] == pytest.approx(3 / 7)
    assert found["recovery_trained"] == pytest.approx(0.75)
    assert found["recovery_held_out"] == pytest.approx(0.5 / 0.75)
    assert found["gap_closed"] == pytest.approx(0.5)
    assert found["recovery_above_chance"] == pytest.approx((0.625 - 0.125) / (0.875 - 0.125))
    assert found["flipped"]["recovered"]["sums"] == {"right_to_wrong": 1, "wrong_to_right": 0}
    assert found["flipped"]["pruned"]["facts"] == {"right_to_wrong": 2, "wrong_to_right": 1}


def test_what_is_not_defined_is_none() -> None:
    """Nothing trained on, nothing pruned away, no chance level, no recovered model: None, not a number."""
    same = {"unpruned": MODELS["unpruned"], "pruned": MODELS["unpruned"], "recovered": MODELS["unpruned"]}
    found = summarise(same, chance={"sums": 0.0, "facts": None})
    assert found["recovery"] == 1 and found["gap_closed"] is None
    assert found["recovery_trained"] is None and found["recovery_held_out"] == 1
    assert found["recovery_above_chance"] is None
    without = {model: MODELS[model] for model in ("unpruned", "pruned")}
    pruned_only = summarise(without, chance={}, trained=["sums"])
    assert pruned_only["recovery"] is None and pruned_only["pruned_recovery"] == pytest.approx(3 / 7)
    nothing = {"unpruned": {"sums": [0, 0]}, "recovered": {"sums": [0, 1]}}
    assert summarise(nothing, chance={})["recovery"] is None


def test_the_chance_of_a_reported_task_is_the_mean_over_its_parts() -> None:
    """And is not known where that of one part is not."""
    part_of = {"algebra": "mmlu", "law": "mmlu", "mc1": "truth", "mc2": "truth"}
    levels = {"algebra": 0.25, "law": 0.35, "mc1": 0.2, "mc2": None, "sums": 0.0}
    assert reported_chance(levels, part_of) == {"mmlu": pytest.approx(0.3), "truth": None, "sums": 0.0}


def test_parts_of_a_reported_task_are_averaged_without_weights() -> None:
    """Parts become one row; its standard error is the root of the summed squares over the number of parts."""
    part_of = {"sums": "school", "facts": "school"}
    found = summarise(MODELS, chance={}, part_of=part_of, trained=["school"])
    assert found["scores"]["unpruned"] == {"school": 0.875, "average": 0.875}
    assert found["standard_errors"]["unpruned"]["school"] == pytest.approx(stats.sem([1, 1, 0, 1]) / 2)
    assert found["recovery_trained"] == pytest.approx(5 / 7) and found["recovery_held_out"] is None


SUBJECTS = {f"subject{n}": [float(n % 3 == 0)] for n in range(57)}
ITEMS = [item for items in SUBJECTS.values() for item in items]


def test_parts_of_one_item_are_as_sure_as_their_items_are_together() -> None:
    """A mean of one item from each part is the mean of these items, and so are its error and its resamplings; a
    part with several items keeps its own spread."""
    part_of = dict.fromkeys(SUBJECTS, "mmlu")
    found = summarise({"unpruned": SUBJECTS}, chance={}, part_of=part_of)
    assert found["standard_errors"]["unpruned"]["mmlu"] == pytest.approx(stats.sem(ITEMS))
    drawn = statistics.resample([SUBJECTS], replicates=20000)
    assert drawn.mean() == pytest.approx(np.mean(ITEMS), abs=2e-3)
    assert drawn.std() == pytest.approx(np.std(ITEMS) / len(ITEMS) ** 0.5, rel=0.03)
    mixed = {"unpruned": {"law": [1, 0, 1], "art": [0]}}
    error = summarise(mixed, chance={}, part_of={"law": "mmlu", "art": "mmlu"})["standard_errors"]["unpruned"]
    assert error["mmlu"] == pytest.approx(np.hypot(stats.sem([1, 0, 1]), np.std([1, 0, 1, 0], ddof=1)) / 2)


def test_a_summary_is_valid_json_whatever_its_number_of_items() -> None:
    """One item shows no error, nor has an average one that it is part of; what JSON cannot say is nowhere."""
    for items in (1, 2):
        scores = {"gsm8k": [1.0] * items, **SUBJECTS}
        models = dict.fromkeys(("unpruned", "pruned", "recovered"), scores)
        found = summarise(models, chance={}, part_of=dict.fromkeys(SUBJECTS, "mmlu"))
        json.dumps(found, allow_nan=False)
        errors = found["standard_errors"]["recovered"]
        assert [errors[name] is None for name in ("gsm8k", "mmlu", "average")] == [items == 1, False, items == 1]
        shown = {task: score for task, _, score, *_ in table.rows(found)}
        assert ("100.0 ± -" if items == 1 else "100.0 ± 0.0") == shown["gsm8k"]
