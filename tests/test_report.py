"""The report: curves and comparisons by hand, and a page that needs nothing beside it."""

from __future__ import annotations

import csv
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from scipy.stats import sem, t, ttest_rel
from stored import artifact
from wandb_file import history, records

from sddx.commands import report
from sddx.report import figures, page, table
from sddx.report.agreement import correlation, lowest, per_unit, stability
from sddx.report.contrasts import differences
from sddx.report.curves import AXES, KEPT, MEASURES, Point, arms, families, variant_differences, variants
from sddx.report.headline import SAME, headline, verdict
from sddx.report.merges import gains, merge_sections, merges
from sddx.report.publish import _scalars, publish, to_loggers
from sddx.report.sections import heat_maps, variant_sections
from sddx.report.tasks import scores, task_table, tasks_of
from sddx.report.workspace import workspace
from sddx.statistics.intervals import Interval, crossed_difference, paired_difference, t_interval
from sddx.sweep import cells

TASKS = {"trained": 0.5, "held": 0.8, "other": 0.9}


def run(loss: str = "sft", seed: int = 0, removed: int = 3, gain: float = 0.0, **choices: object) -> dict:
    """A finished run, with the fields that a summary.json has."""
    scores = {task: score + gain for task, score in TASKS.items()}
    models = {"unpruned": dict.fromkeys(TASKS, 1.0), "pruned": dict.fromkeys(TASKS, 0.4), "recovered": scores}
    for found in models.values():
        found["average"] = sum(found.values()) / 3
    recovery = models["recovered"]["average"]
    return {
        "choices": {"loss": loss, "seed": seed, "removed": removed, "size": 1500, "model": "tiny", **choices},
        "scores": models, "trained": ["trained"], "recovery": recovery, "recovery_low": recovery - 0.01,
        "recovery_high": recovery + 0.01, "recovery_trained": scores["trained"], "recovery_above_chance": recovery,
        "recovery_held_out": (scores["held"] + scores["other"]) / 2, "gap_closed": (recovery - 0.4) / 0.6,
        "pruned_recovery": 0.4, "fallback_share": None if loss == "sft" else 0.1, "examples": 100,
        "supervised_tokens": 1000, "steps": 10, "seconds": {"train": 5.0, "evaluate_recovered": 2.0},
        "peak_memory": {"train": 2**30}, "parameters": {"unpruned": 100, "pruned": 75}, "artifacts": {},
        "cut": [0, 1], "blocks": 4, "store": "nowhere",
    }  # fmt: skip


def items_of(scores: list[float], task: str) -> dict:
    """What a samples.json says of the items of one task."""
    return {"scores": scores, "hashes": [*map(str, range(len(scores)))], "settings": {}, "part_of": task}


def rows_of(found: dict) -> dict[str, list]:
    """The rows of every table, by the name of its section."""
    return {section.name: section.table["rows"] for section in found["sections"] if section.table}


GAINS = {("sft", 0): 0.00, ("sft", 1): 0.02, ("sft", 2): 0.01, ("sdd", 0): 0.03, ("sdd", 1): 0.04, ("sdd", 2): 0.06}


def grid() -> list[dict]:
    """Two block counts, two arms, three seeds."""
    return [run(*key, removed=n, gain=gain - n / 100) for n in (2, 3) for key, gain in GAINS.items()]


def test_a_point_is_the_mean_over_seeds_with_its_t_interval() -> None:
    (family,) = families(grid())
    first, second = family.curve("sft", "recovery")
    values = [sum(TASKS.values()) / 3 + gain - 0.02 for gain in (0.0, 0.02, 0.01)]
    assert (family.axis, first.x, second.x, first.seeds) == ("removed", 2, 3, 3)
    assert first.interval.estimate == pytest.approx(sum(values) / 3)
    assert first.interval.half_width == pytest.approx(t.ppf(0.975, 2) * 0.01 / 3**0.5)
    assert family.arms == ["sft", "sdd"] and family.pruned() == [(2, 0.4), (3, 0.4)]


def test_one_seed_has_the_interval_over_items_and_says_so() -> None:
    (family,) = families([run(removed=2), run(removed=3)])
    point = family.curve("sft", "recovery")[0]
    assert point.interval.contains == "items" and point.interval.half_width == pytest.approx(0.01)
    assert family.curve("sft", "recovery_held_out")[0].interval.half_width == 0


def test_a_curve_without_intervals_is_drawn(tmp_path: Path) -> None:
    """Nothing trained, at 32 block counts, by a model whose recovery has no interval: a page all the same."""
    runs = [run("none", removed=n) | {"recovery_low": None, "recovery_high": None} for n in range(32)]
    for each in runs:
        each["text"] = {model: {"perplexity": 1234.5} for model in each["scores"]}
    publish(runs, [], tmp_path)
    written = (tmp_path / "report.html").read_text()
    assert "1,234.50" in written and written.count("<svg") >= 2


@pytest.mark.parametrize("places", [(2,), (2, 3)])
def test_a_place_without_a_recovery_is_left_out(places: tuple[int, ...]) -> None:
    """The unpruned model scored nothing there, so that nothing is a share of it; the rest is drawn."""
    missing = dict.fromkeys(("pruned_recovery", "recovery", "recovery_low", "recovery_high", "gap_closed"))
    runs = [each | missing if each["choices"]["removed"] in places else each for each in grid()]
    (family,) = families(runs)
    assert [x for x, _ in family.pruned()] == [x for x in (2, 3) if x not in places]
    drawn = {section.name: section.figures for section in page.contents(runs, [])["sections"]}
    measured = [any(family.curve(arm, measure) for arm in family.arms) for measure in MEASURES]
    assert len(drawn["curves 1"]) == sum(measured) and len(drawn["cost"]) == 1
    assert page.html(page.contents(runs, [])).count("<svg") == sum(map(len, drawn.values()))
    assert "</svg>" in figures.curves(family, "recovery", "Recovery")


def test_runs_that_differ_otherwise_are_other_curves() -> None:
    """Two models over two block counts are two families, named for the model."""
    both = [run(removed=n, model=model) for n in (2, 3) for model in ("tiny", "large")]
    assert {(family.axis, family.fixed) for family in families(both)} == {
        ("removed", "model tiny"), ("removed", "model large")
    }  # fmt: skip


def test_arms_at_their_own_learning_rates_are_still_held_against_each_other() -> None:
    """One rate for each arm belongs to the arm; two rates of one arm tell runs apart."""
    rates = {"sft": 5e-4, "sdd": 4e-3}
    own = [run(*key, gain=gain, learning_rate=rates[key[0]]) for key, gain in GAINS.items()]
    (found,) = differences(own)
    assert (found.arm, found.seeds) == ("sdd", 3)
    other = [run("sft", seed=seed, learning_rate=4e-3) for seed in (0, 1, 2)]
    assert [d.where for d in differences([*own, *other])] == ["learning_rate 0.004"]


def test_rows_that_every_seed_draws_for_itself_belong_to_the_seed() -> None:
    """Pairs by seed, as where the rows are the same; rows that are drawn apart from it tell runs apart."""
    bound = [run(*key, gain=gain, dataset_seed=key[1]) for key, gain in GAINS.items()]
    (found,) = differences(bound)
    assert (found.where, found.seeds) == ("all runs", 3)
    apart = [run(*key, gain=gain, dataset_seed=rows) for rows in (0, 1) for key, gain in GAINS.items()]
    assert [(d.where, d.seeds) for d in differences(apart)] == [("dataset_seed 0", 3), ("dataset_seed 1", 3)]
    fixed = [run("kd", seed, dataset_seed=0) for seed in (0, 1, 2)]  # of another arm, whose rows are its own affair
    (found,) = differences([*bound, *fixed])
    assert (found.arm, found.seeds) == ("sdd", 3)
    assert len(differences([*bound, *(run(*key, removed=2, dataset_seed=0) for key in GAINS)])) == 2


def test_a_run_in_two_sweeps_counts_once(tmp_path: Path) -> None:
    for sweep in ("a", "b"):
        (tmp_path / sweep / "0").mkdir(parents=True)
        (tmp_path / sweep / "0/summary.json").write_text(json.dumps(run() | {"artifacts": {"train": "x"}}))
    assert len(page.of_folders([tmp_path])) == len(page.of_folders([tmp_path / "a/0/summary.json"])) == 1
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "summary.json").write_text('{"choices": {')  # one that a full disk cut short
    assert len(page.of_folders([tmp_path])) == 1


@pytest.mark.parametrize(
    "own",
    [
        {"teacher_cache": 64},
        {"budget": "steps", "steps": 192, "tokens": None},
        {"loss.temperature": 2.0},
        {"learning_rate": 4e-3, "budget": "steps", "steps": 192},
    ],
)
def test_what_only_one_arm_has_does_not_part_it_from_the_other(own: dict) -> None:
    """Its teacher, its loss, and how equal tokens or seconds are told to it; what both arms have twice does."""
    shared = {"budget": "tokens", "tokens": 95000, "steps": None, "learning_rate": 1e-3}
    both = [run("sft", seed=s, **shared) for s in (0, 1)], [run("kd", seed=s, **shared | own) for s in (0, 1)]
    (found,) = differences([*both[0], *both[1]])
    assert (found.arm, found.seeds) == ("kd", 2)
    longer = [one | {"choices": one["choices"] | {"tokens": 7}} for runs in both for one in runs]
    assert len(differences([*both[0], *both[1], *longer])) == (1 if "tokens" in own else 2)


def test_a_run_that_was_built_again_is_no_second_seed(tmp_path: Path) -> None:
    """By other code, under other keys: the newer one counts."""
    for age, (name, gain) in enumerate((("new", 0.1), ("old", 0.0))):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "summary.json"
        file.write_text(json.dumps(run(gain=gain) | {"artifacts": {"train": name}}))
        os.utime(file, (1e9 - age, 1e9 - age))
    (found,) = page.of_folders([tmp_path])
    assert found["artifacts"] == {"train": "new"}


def test_seeds_of_training_make_no_other_of_a_pruned_model() -> None:
    untrained = [run("none", seed=seed, removed=n) | {"artifacts": {"evaluate_pruned": f"{n}"}}
                 for seed in (0, 1, 2) for n in (2, 3)]  # fmt: skip
    for one in untrained:
        del one["scores"]["recovered"]
    (family,) = families(untrained)
    assert [(point.seeds, point.interval.contains) for point in family.curve("none", "pruned_recovery")] == [
        (1, "nothing"), (1, "nothing")
    ]  # fmt: skip


def test_arms_are_held_against_each_other_on_the_same_tasks_alone() -> None:
    pairs = [run(arm, seed=seed) for arm in ("sft", "sdd") for seed in (0, 1)]
    assert len(differences(pairs)) == 1
    for one in pairs[2:]:
        del one["scores"]["recovered"]["other"]
    assert differences(pairs) == []


def test_choosing_costs_a_report_nothing() -> None:
    """p is adjusted over runs on items for reporting and for choosing apart."""
    gains = {"sft": (0.0, 0.01, 0.0), "sdd": (0.05, 0.055, 0.06)}
    reported = [run(arm, seed=s, gain=gain) for arm, each in gains.items() for s, gain in enumerate(each)]
    chosen = [
        run(arm, seed=s, gain=gain, side="selection", size=size)
        for size in (1, 2, 3)
        for arm, each in gains.items()
        for s, gain in enumerate(each)
    ]
    (alone,), many = differences(reported), differences([*reported, *chosen])
    assert len(many) == 4 and min(d.p_average for d in many) == alone.p_average


def test_what_is_the_same_in_every_seed_has_no_p() -> None:
    """A t test would divide by nothing; the others' adjustment does not count it."""
    same = [run(arm, seed=seed, gain=gain) for arm, gain in (("sft", 0.0), ("sdd", 0.1)) for seed in (0, 1)]
    assert [(d.p_average, d.p_held_out) for d in differences(same)] == [(None, None)]


def test_runs_from_before_a_choice_had_a_name_are_alike() -> None:
    """An absent choice, one that is null and one at its default are one."""
    old, new = run("sft", seed=0, removed=2), run("sdd", seed=0, removed=2, units="blocks", keep=None, patch="none")
    pair = [run("sft", seed=1, removed=2), run("sdd", seed=1, removed=2, gain=0.2)]
    assert [d.seeds for d in differences([old, new, *pair])] == [2]


def test_variants_are_named_by_what_varies_in_them(tmp_path: Path) -> None:
    """A patch that was trained and one that was not stand apart; one that only comes in one way has its name."""
    patches = [("none", False, None), ("linear", False, None), ("linear", True, None), ("low_rank", False, 8)]
    runs = [
        run(removed=n, patch=name, patch_trained=trained, patch_rank=rank, patch_fold=False)
        for n in (2, 3)
        for name, trained, rank in patches
    ]
    found = variants(runs, "patch")
    assert [variant.name for variant in found] == [
        "none",
        "linear trained=False",
        "linear trained=True",
        "low_rank",
    ]
    assert all(list(variant.runs) == [2, 3] for variant in found) and variants(runs, "pruning") == []


def test_variants_differ_on_the_same_items(tmp_path: Path) -> None:
    """One seed: an interval over items, of the average over tasks; runs without samples are left out."""
    wrong = {"none": (6, 4), "linear": (2, 0)}
    runs = []
    for name, (a, b) in wrong.items():
        items = {"held": [0.0] * a + [1.0] * (20 - a), "other": [0.0] * b + [1.0] * (20 - b)}
        scores = {task: items_of(values, task) for task, values in items.items()}
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.json").write_text(json.dumps({"pruned": scores, "recovered": scores}))
        runs.append(run(patch=name) | {"folder": str(tmp_path / name)})
    (found,) = variant_differences(runs, "patch")
    assert (found.name, found.seeds, found.before.contains) == ("linear", 1, "items")
    assert found.before.estimate == found.after.estimate == pytest.approx(0.2)
    assert 0 < found.after.low < 0.2 < found.after.high
    assert variant_differences([entry | {"folder": ""} for entry in runs], "patch") == []
    other = json.loads((tmp_path / "linear/samples.json").read_text())
    other["pruned"]["held"]["hashes"][3] = other["recovered"]["held"]["hashes"][3] = "other"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/samples.json").write_text(json.dumps(other))
    assert variant_differences([runs[0], runs[1] | {"folder": str(tmp_path / "other")}], "patch") == []
    sections = variant_sections(runs)
    assert [section.name for section in sections] == ["by patch", "by patch differences", "by patch tasks"]
    assert sections[1].title == "By patch, minus none" and "+20.0" in sections[1].table["rows"][0][-1]


def judged(folder: Path, pruned: int, recovered: int, **choices: object) -> dict:
    """A run whose models had so many of 20 items right."""
    models = {
        model: {"held": items_of([1.0] * right + [0.0] * (20 - right), "held")}
        for model, right in (("pruned", pruned), ("recovered", recovered))
    }
    folder.mkdir()
    (folder / "samples.json").write_text(json.dumps(models))
    return run(**choices) | {"folder": str(folder)}


@pytest.mark.parametrize("seeds", [1, 2])
def test_draws_count_once_each_whatever_their_seeds(tmp_path: Path, seeds: int) -> None:
    """The mean over draws of random cuts, with the t interval over draws, held against one cut; seeds of training
    leave the pruned model as it was, and are averaged in each draw after training."""
    right, runs = (2, 10, 18), []
    for seed in range(seeds):
        runs.append(judged(tmp_path / f"base{seed}", 15, 16, seed=seed, pruning="angular"))
        for draw, count in enumerate(right):
            folder = tmp_path / f"random{draw}{seed}"
            runs.append(judged(folder, count, count + seed, seed=seed, pruning="random", cut_seed=draw))
    (found,) = variant_differences(runs, "pruning")
    points = [count / 20 - 15 / 20 for count in right]
    low, high = t.interval(0.95, 2, loc=-0.25, scale=sem(points))
    assert (found.seeds, found.draws, found.before.contains) == (seeds, 3, "draws")
    assert found.before.estimate == pytest.approx(-0.25) and found.before.low == pytest.approx(low)
    assert found.after.estimate == pytest.approx(-0.3 + 0.05 * (seeds - 1) / 2)
    assert found.after.half_width == pytest.approx((high - low) / 2)


def test_a_cut_of_every_block_is_ringed(tmp_path: Path) -> None:
    """No block is kept, so that the blocks' number is not to be read off those that are."""
    distances = [[abs(a - b) / 4 for a in range(5)] for b in range(5)]
    artifact(tmp_path, "score", "key", {"scores.json": json.dumps({"pruning": {"mean": distances}})})
    everything = run() | {"artifacts": {"score": "key"}, "cut": [], "store": str(tmp_path)}
    assert len(heat_maps([everything]).figures) == 1


def test_rank_correlations_and_stability_by_hand() -> None:
    """Spearman's: 1 for the same order, -1 for the reverse; distances are read off the first diagonal."""
    assert correlation([1, 2, 3], [10, 20, 21]) == pytest.approx(1) == -correlation([1, 2, 3], [3, 2, 1])
    assert correlation([1, 1, 1], [1, 2, 3]) == 0
    square = [[0, 5, 9], [5, 0, 4], [9, 4, 0]]
    assert per_unit(square) == [5, 4] and lowest({"mean": square}, 1) == [1]
    parts = {"mean": [1, 2, 3], "subsets": [[1, 2, 3], [1, 2, 3], [3, 2, 1]]}
    assert stability(parts) == pytest.approx((1 - 1 - 1) / 3) and stability({"subsets": []}) is None


def test_differences_are_paired_and_adjusted() -> None:
    """The p of scipy's paired test, times two by Holm for the smaller of two; only seeds in common count."""
    found = differences([*grid(), run("sdd", seed=7, removed=2, gain=0.5)])
    assert [(d.where, d.arm, d.seeds) for d in found] == [("removed 2", "sdd", 3), ("removed 3", "sdd", 3)]
    p = ttest_rel([0.03, 0.04, 0.06], [0.00, 0.02, 0.01]).pvalue
    assert found[0].average.estimate == pytest.approx(100 * (0.03 + 0.02 + 0.05) / 3)
    assert found[0].p_average == pytest.approx(2 * p)
    assert found[0].held_out.estimate == pytest.approx(found[0].average.estimate)


def arm(loss: str, gains: list[float], **choices: object) -> list[dict]:
    """One run a seed."""
    return [run(loss, seed=seed, gain=gain, **choices) for seed, gain in enumerate(gains)]


SFT = [0.0, 0.02, 0.01]


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([0.10, 0.13, 0.11], "sdd scored higher than sft (+10.3 points, +8.9 to +11.8) in "),
        ([-0.1, -0.07, -0.09], "sdd scored lower than sft (-9.7 points, -11.1 to -8.2) in "),
        ([0.03, -0.02, 0.03], "sdd and sft are not told apart (+0.3 points, -9.1 to +9.7) in "),
    ],
)
def test_one_sentence_says_what_was_found(gains: list[float], said: str) -> None:
    """The difference with its interval, seeds and what was equal, at the top of the page and of the Markdown."""
    runs = [*arm("sft", SFT), *arm("sdd", gains)]
    found = page.contents(runs, [])
    assert found["headline"].startswith(said + "the average over 3 tasks (95 % over 3 seeds);")
    assert found["headline"].endswith("; examples equal, supervised tokens equal.")
    assert page.markdown(found).startswith(found["headline"]) and found["headline"] in page.html(found)
    unequal = [each | {"examples": 99, "supervised_tokens": 800} for each in runs[3:]]
    assert headline([*runs[:3], *unequal]).endswith("; examples equal, supervised tokens unequal.")


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        (arm("sdd", SFT), "sdd is the only one"),
        ([*arm("sdd", SFT), *arm("kd", SFT)], "no run of sft is here to hold kd and sdd against"),
        ([run("sft"), run("sdd", gain=0.4)], "none has two seeds in common with sft"),
        ([*arm("sft", SFT), run("sdd", seed=1), run("sdd", seed=9)], "none has two seeds in common with sft"),
        (
            [*arm("sft", SFT, side="selection"), *arm("sdd", [0.4, 0.41, 0.43], side="selection")],
            "all runs were evaluated on selection items",
        ),
    ],
)
def test_nothing_is_said_of_arms_without_a_reason_to(runs: list[dict], reason: str) -> None:
    assert headline(runs).startswith(f"Nothing is said of arms: {reason}")


def test_where_students_wrote_seconds_count_too() -> None:
    """Their tokens and seconds stand beside the others' in the table of arms, and the sentence says whether all
    took as long; where nobody wrote it says nothing of that."""
    written = {"rows": 100, "tokens": 2345, "ended": 90, "repeating": 1, "seconds": 12.0}
    plain = [each | {"training_seconds": 40.0} for each in arm("sft", SFT)]
    for seconds, said in ((42.0, "equal"), (60.0, "unequal")):
        wrote = [each | {"training_seconds": seconds, "rollouts": written} for each in arm("on_policy", SFT)]
        assert headline([*plain, *wrote]).endswith(f", training seconds {said}.")
        table = page.arm_table([*plain, *wrote])
        assert table["header"][-2:] == ["written tokens", "writing s"]
        assert [row[-2:] for row in table["rows"]] == [["-", "-"], ["2,345", "12"]]
    alone = [*plain, *arm("sdd", SFT)]
    assert "seconds" not in headline(alone) and "writing s" not in page.arm_table(alone)["header"]


def test_untrained_runs_say_nothing_of_arms() -> None:
    assert (
        headline([untrained(2, 0.8, 20.0), untrained(4, 0.3, 40.0)]) == "Nothing is said of arms: no run trained."
    )


def test_no_sentence_claims_where_the_interval_holds_zero() -> None:
    """Over grids of noise, and where Holm leaves nothing of several differences; every comparison is counted."""
    generator = np.random.default_rng(0)
    for _ in range(60):
        runs = [
            each
            for removed in (2, 3)
            for name in ("sft", "sdd", "kd")
            for each in arm(name, list(generator.normal(0.0, 0.05, size=3)), removed=removed)
        ]
        found = differences(runs)
        for d in found:
            holds_zero = d.average.low <= 0 <= d.average.high
            assert verdict(d) == SAME if holds_zero or d.p_average >= 0.05 else verdict(d) != SAME
        counts = {kind: sum(verdict(d) == kind for d in found) for kind in ("higher", "lower", SAME)}
        said = headline(runs)
        for kind, count in counts.items():
            assert sum(map(int, re.findall(rf"{kind} in (\d) of 2", said))) == count


def test_of_one_seed_the_interval_is_over_items(tmp_path: Path) -> None:
    """As by hand, without a p, and it says so; the sentence claims nothing of it."""
    runs = [judged(tmp_path / name, 5, right, loss=name) for name, right in (("sft", 8), ("sdd", 15))]
    (found,) = differences(runs)
    sides = [{"held": [1.0] * right + [0.0] * (20 - right)} for right in (15, 8)]
    hand = paired_difference([sides[0]], [sides[1]])
    assert (found.seeds, found.items, found.p_average, found.average.contains) == (1, 20, None, "items")
    assert found.average.estimate == pytest.approx(35) and found.average.low == pytest.approx(100 * hand.low)
    assert verdict(found) == SAME and "Nothing is said" in headline(runs)
    (row,) = page.difference_table([found])["rows"]
    assert row[5].endswith(" over items") and row[6:] == ["-", "20", table.ABSENT] and found.both is None
    assert "one seed, over items" in page.forests([found])[0].svg.replace("\n", " ")


def test_beside_the_interval_over_seeds_stands_the_one_over_items_too(tmp_path: Path) -> None:
    """As by hand from what the items scored; the verdict is of seeds alone, as it was."""
    right = {("sft", 0): 8, ("sft", 1): 9, ("sdd", 0): 14, ("sdd", 1): 16}
    runs = [judged(tmp_path / f"{arm}{seed}", 5, n, loss=arm, seed=seed) for (arm, seed), n in right.items()]
    (found,) = differences(runs)
    sides = [
        [{"held": [1.0] * right[arm, k] + [0.0] * (20 - right[arm, k])} for k in (0, 1)] for arm in ("sdd", "sft")
    ]
    hand = crossed_difference(*sides)
    assert found.both and (found.both.low, found.both.high) == pytest.approx((100 * hand.low, 100 * hand.high))
    assert (found.average.contains, found.both.contains) == ("seeds", "seeds and items")
    assert page.difference_table([found])["rows"][0][-1].endswith(" over seeds and items")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Every figure that is drawn, by its label."""
    kept: dict = {}
    plain = figures._svg
    monkeypatch.setattr(
        figures, "_svg", lambda figure, label: kept.setdefault(label, figure) and plain(figure, label)
    )
    return kept


def bars(figure: object) -> list[tuple[float, float, float]]:
    """(middle, low, high) of every error bar from top to bottom."""
    (axis,) = figure.axes  # type: ignore[attr-defined]
    lines = [(each.lines[0].get_xdata()[0], each.lines[2][0].get_segments()[0]) for each in axis.containers]
    return [(middle, ends[0][0], ends[1][0]) for middle, ends in lines]


def test_a_forest_has_the_rows_and_the_numbers_of_its_table(drawn: dict) -> None:
    """One a comparison, beside a line at zero; held-out tasks by themselves where they are another picture."""
    runs = [*grid(), *(run("kd", seed, removed=2, gain=0.01 * seed) for seed in (0, 1, 2))]
    for each in runs[3:6]:
        each["scores"]["recovered"]["held"] += 0.1
    found = differences(runs)
    titles = [figure.title for figure in page.forests(found)]
    assert titles == ["All tasks", "Tasks that were not trained on"]
    for title, column in zip(titles, (5, 3), strict=True):
        figure = drawn[f"Paired differences to SFT: {title}"]
        shown = [f"{middle:+.1f} ({low:+.1f} to {high:+.1f})" for middle, low, high in bars(figure)]
        rows = page.difference_table(found)["rows"]
        assert shown == [row[column] for row in rows] and len(shown) == 3
        labels = [text.get_text().replace("\n", " ") for text in figure.axes[0].get_yticklabels()]
        assert labels == [f"{row[1]}, {row[0]}" for row in rows]
        assert any(line.get_xdata()[0] == line.get_xdata()[1] == 0 for line in figure.axes[0].lines)


def test_every_task_has_a_plot_of_the_tables_numbers(drawn: dict) -> None:
    """The unpruned model once, then of each setting the pruned one and every arm, with their errors and chance."""
    errors = {"unpruned": 0.0, "pruned": 0.03, "recovered": 0.02}
    runs = [each | {"chance": {"held": 0.25}, "standard_errors": {}} for each in grid()]
    for each in runs:
        each["standard_errors"] = {model: {"held": error} for model, error in errors.items()}
    table_of, (section,) = task_table(runs), [s for s in page.sections(runs, []) if s.name == "tasks"]
    assert [figure.title for figure in section.figures] == table_of["header"][2:-1]
    assert tasks_of(runs) == [*TASKS, "average"]
    for place, task in enumerate(tasks_of(runs), start=2):
        shown = scores(runs, task)
        assert [[s.where, s.model, str(s)] for s in shown] == [[*row[:2], row[place]] for row in table_of["rows"]]
    assert [s.model for s in scores(runs, "held")] == ["unpruned", *["pruned", "sft", "sdd"] * 2]
    figure = drawn["Scores in held"]
    held = [(mean(s.seeds), s.error) for s in scores(runs, "held")]
    assert [bar[0] for bar in bars(figure)] == pytest.approx([middle for middle, _ in held])
    assert [bar[2] - bar[0] for bar in bars(figure)] == pytest.approx([error for _, error in held])
    assert any(list(line.get_xdata()) == [25, 25] for line in figure.axes[0].lines)
    assert not any(list(line.get_xdata()) == [25, 25] for line in drawn["Scores in other"].axes[0].lines)


def test_where_every_task_was_trained_on_nothing_is_held_out() -> None:
    """The average is compared all the same, and a dash stands where there is nothing to compare."""
    runs = [each | {"trained": list(TASKS), "recovery_held_out": None} for each in grid()]
    found = rows_of(page.contents(runs, []))["differences"]
    assert [row[3:5] for row in found] == [["-", "-"]] * 2
    assert [row[5] for row in found] == [row[5] for row in page.difference_table(differences(grid()))["rows"]]


FIGURES = 1 + 1 + len(TASKS) + 1  # cost; differences; each task and the average


class Outside(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.counted: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.counted[tag] = self.counted.get(tag, 0) + 1
        given = dict(attrs)
        links = [given.get("src"), given.get("href"), given.get("xlink:href")]
        self.fetched += [link for link in links if link and not link.startswith("#")]


def test_the_page_stands_alone_and_shows_every_figure_with_its_numbers() -> None:
    text = page.html(page.contents(grid(), [("s9", "failed", "<b>no room</b>")]))
    seen = Outside()
    seen.feed(text)
    assert not seen.fetched and "<script" not in text
    assert seen.counted["svg"] == len(MEASURES) + FIGURES and seen.counted["details"] == len(MEASURES)
    assert "&lt;b&gt;no room" in text and "currentColor" in text and "#010203" not in text
    assert all(
        f'href="#{name}"' in text and f'id="{name}"' in text for name in ("arms", "differences", "cost", "failed")
    )


def test_every_section_stands_in_the_page_and_in_markdown_in_one_order() -> None:
    """Each once in the navigation and once below it, under one title; none is empty."""
    runs = [run(**each["choices"] | {"pruning": metric}) for each in grid() for metric in ("angular", "last")]
    found = page.contents(runs, [("s9", "failed", "no room")])
    titles = [section.title for section in found["sections"]]
    text, written = page.html(found), page.markdown(found)
    assert re.findall(r"<h2 id=.*?>(.*?)</h2>", text) == titles == re.findall(r"<a href=.*?>(.*?)</a>", text)
    assert re.findall(r'<a href="#(.*?)"', text) == re.findall(r'<h2 id="(.*?)"', text)
    headings = re.findall("^## (.*)$", written, re.MULTILINE)
    assert headings == [title for section in found["sections"] for title in section.tables]
    assert {"by metric", "by metric tasks", "differences", "failed"} <= rows_of(found).keys()


def test_the_three_files_hold_the_same_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number, found in enumerate(grid()):
        (tmp_path / f"sweep/{number}").mkdir(parents=True)
        (tmp_path / f"sweep/{number}/summary.json").write_text(json.dumps(found))
    cells.write(tmp_path / "sweep/99", number=99, name="s9", launcher="basic", state="failed", reason="no room")
    assert report.main([str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]) == 0
    rows = list(csv.DictReader((tmp_path / "out/report.csv").open()))
    assert len(rows) == 12 and {row["removed"] for row in rows} == {"2", "3"}
    assert float(rows[0]["recovery"]) == pytest.approx(grid()[0]["recovery"])
    tables = (tmp_path / "out/report.md").read_text()
    assert "| removed 2 | sdd | 3 |" in tables and "no room" in tables
    assert len(re.findall("<figure>", (tmp_path / "out/report.html").read_text())) == len(MEASURES) + FIGURES


def read(found: dict, strict: float, flexible: float, unparsed: float) -> dict:
    """A run whose recovered model answers in another format than the two others."""
    models = {"unpruned": (0.9, 0.9, 0.0), "pruned": (0.1, 0.2, 0.5), "recovered": (strict, flexible, unparsed)}
    filters = {
        model: dict(zip(("match,strict", "match,flexible"), of, strict=False)) for model, of in models.items()
    }
    return found | {
        "part_of": {"trained": "trained", "held": "held"},
        "primary": {"trained": "match,strict", "held": "acc,none"},
        "metrics": {model: {"trained": scores, "held": {"acc,none": 0.8}} for model, scores in filters.items()},
        "unparsed": {model: {"trained": {"strict": of[2], "flexible": 0.0}} for model, of in models.items()},
    }


READ = {"sft": [(0.50, 0.52, 0.02), (0.54, 0.55, 0.00)], "sdd": [(0.30, 0.60, 0.40), (0.36, 0.64, 0.36)]}


def test_arms_are_held_against_each_other_under_every_filter() -> None:
    """Means over seeds; a strict score that favours SFT stands beside the flexible one that does not, each with its
    paired t test, times two by Holm for the smaller p."""
    runs = [read(run(arm, seed=seed), *of) for arm, seeds in READ.items() for seed, of in enumerate(seeds)]
    found = page.contents([*runs, run("kd", removed=5)], [])
    tables = rows_of(found)
    assert [row[1:] for row in tables["readings"]] == [
        ["unpruned", "trained", "match,strict (primary)", "90.0 %", "0.0 %"],
        ["unpruned", "trained", "match,flexible", "90.0 %", "0.0 %"],
        ["pruned", "trained", "match,strict (primary)", "10.0 %", "50.0 %"],
        ["pruned", "trained", "match,flexible", "20.0 %", "0.0 %"],
        ["sft", "trained", "match,strict (primary)", "52.0 %", "1.0 %"],
        ["sft", "trained", "match,flexible", "53.5 %", "0.0 %"],
        ["sdd", "trained", "match,strict (primary)", "33.0 %", "38.0 %"],
        ["sdd", "trained", "match,flexible", "62.0 %", "0.0 %"],
    ]
    p = [ttest_rel(*([of[place] for of in READ[arm]] for arm in ("sdd", "sft"))).pvalue for place in (0, 1)]
    strict, flexible = tables["reading_differences"]
    assert strict[1:5] == ["sdd", "2", "trained", "match,strict (primary)"] and flexible[4] == "match,flexible"
    assert strict[5].startswith("-19.0 (") and flexible[5].startswith("+8.5 (") and p[0] < p[1]
    assert (strict[6], flexible[6]) == (f"{2 * p[0]:.3f}", f"{max(2 * p[0], p[1]):.3f}")
    for text in (page.html(found), page.markdown(found).replace("\\_", "_")):
        assert "38.0 %" in text and strict[5] in text and flexible[5] in text


def test_a_task_is_told_of_all_runs_where_one_left_an_answer_unread() -> None:
    """The mean under its filter is over all seeds, as the score beside it is."""

    def one_filter(seed: int, score: float, unparsed: float) -> dict:
        return run("sdd", seed=seed) | {
            "part_of": {"trained": "trained"},
            "primary": {"trained": "match,only"},
            "metrics": {"recovered": {"trained": {"match,only": score}}},
            "unparsed": {"recovered": {"trained": {"only": unparsed}}},
        }

    found = page.contents([one_filter(0, 0.9, 0.0), one_filter(1, 0.5, 0.2)], [])
    assert [row[1:] for row in rows_of(found)["readings"]] == [
        ["sdd", "trained", "match,only (primary)", "70.0 %", "10.0 %"]
    ]


def untrained(removed: int, kept: float, perplexity: float) -> dict:
    """A run of loss=none, as its summary stands on disk."""
    found = run("none", removed=removed)
    del found["scores"]["recovered"]
    missing = dict.fromkeys(
        ("recovery", "recovery_trained", "recovery_held_out", "recovery_above_chance", "gap_closed")
    )
    text = {"pruned": {"perplexity": perplexity}}
    return found | missing | {"pruned_recovery": kept, "text": text, "trained": [], "recovery_low": None}


def test_what_a_cut_costs_has_curves_without_training() -> None:
    """Kept shares and perplexities over what was removed, and no recovery anywhere."""
    runs = [untrained(0, 1.0, 10.0), untrained(2, 0.8, 20.0), untrained(4, 0.3, 4000.0)]
    found = page.contents(runs, [])
    kept, perplexity = ([row[1:3] for row in figure.table["rows"]] for figure in found["sections"][0].figures)
    assert kept == [["0", "100.0 %"], ["2", "80.0 %"], ["4", "30.0 %"]]
    assert perplexity == [["0", "10.00"], ["2", "20.00"], ["4", "4,000.00"]]
    assert {row[1] for row in rows_of(found)["tasks"]} == {"unpruned", "pruned"}
    assert not {"differences", "arms"} & rows_of(found).keys()
    assert page.html(found).count("<svg") == 2 + len(TASKS) + 1


def test_a_value_stands_inside_its_interval() -> None:
    """Both are in one unit, whether they are shares in per cent or perplexities."""
    several = [(0.80, 1250.0), (0.84, 1260.0), (0.79, 1240.0)]
    runs = [untrained(removed, *found) for removed in (2, 3) for found in several]
    (section, *_) = page.contents(runs, [])["sections"]
    for _, _, middle, band, _ in (row for figure in section.figures for row in figure.table["rows"]):
        low, high = band.removesuffix(" over seeds").split(" to ")
        low, value, high = (float(text.removesuffix(" %").replace(",", "")) for text in (low, middle, high))
        assert low < value < high < 2 * value


def test_runs_without_training_stand_beside_those_with(tmp_path: Path) -> None:
    """They are no arm that is held against SFT, and their variants are compared before training alone."""
    runs = [*grid(), untrained(2, 0.8, 20.0), untrained(3, 0.7, 30.0)]
    (family,) = families(runs)
    assert family.measures == MEASURES and not family.curve("none", "recovery")
    assert {d.arm for d in differences(runs)} == {"sdd"} and page.html(page.contents(runs, []))
    metrics = [{**r, "choices": {**r["choices"], "pruning": p}} for r in runs[-2:] for p in ("angular", "last")]
    (section, *_) = variant_sections(metrics)
    assert [figure.title for figure in section.figures] == ["Before training"]
    assert section.table["rows"][0][2:] == ["80.0", "70.0"]


def test_settings_beside_the_axes_keep_runs_apart() -> None:
    """What was set by hand is no seed: two temperatures are two sets of runs, and of arms that write nothing each
    may have what the others lack."""
    cold, warm = ([run("sdd", seed=s, **{"generation.temperature": t}) for s in (0, 1)] for t in (0.0, 0.7))
    assert [len(group) for _, _, group in arms([*cold, *warm])] == [2, 2]
    assert [d.seeds for d in differences([*cold, run("sft", seed=0), run("sft", seed=1)])] == [2]


def test_a_store_gives_the_newest_run_of_every_choice(tmp_path: Path) -> None:
    for number, gain in enumerate((0.1, 0.2)):
        folder = tmp_path / f"report/a/{number}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "summary.json").write_text(json.dumps(run(gain=gain)))
    os.utime(tmp_path / "report/a/0/summary.json", (1, 1))
    (found,) = page.of_store(tmp_path)
    assert found["recovery"] == run(gain=0.2)["recovery"] and found["store"] == str(tmp_path)


def test_selection_items_are_never_reported_without_a_word() -> None:
    """By another split or by their tasks' own names: in the table of a run, and on the page of many."""
    named = run()
    named["scores"] = {model: {"tiny_facts_selection": 0.5, "average": 0.5} for model in named["scores"]}
    named |= {"standard_errors": {}, "trained": [], "name": "mine"}
    for chosen in ([run(split={"mmlu": "validation"})], [named], [run(), named]):
        found = page.contents(chosen, [])
        said = f"1 of {len(chosen)} runs were evaluated on selection items: for choosing, not for reporting."
        assert said in page.html(found) and said in page.markdown(found)
    assert table.markdown(named).startswith(
        "Scores in percent ± standard error, mine (selection items: for choosing"
    )
    assert "selection" not in page.html(page.contents([run()], []))
    assert "selection" not in table.markdown(run() | {"standard_errors": {}})


@pytest.mark.parametrize(
    "change",
    [{"blocks": None}, {"cut": "0"}, {"seconds": None}, {"choices": "tiny"}, {"choices": {}}, {"scores": {}}],
)
def test_a_damaged_summary_is_named_and_left_out(
    change: dict, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """It costs the report of no other run."""
    for name, found in (("good", run()), ("damaged", run() | change)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(found))
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "1 runs: " in capsys.readouterr().out
    assert f"{tmp_path / 'damaged/summary.json'} is damaged" in caplog.text and next(iter(change)) in caplog.text


def test_artifacts_that_are_damaged_are_not_shown(tmp_path: Path) -> None:
    """A report draws what is whole: scores and answers of which a file is gone are left out."""
    distances = [[abs(a - b) / 4 for a in range(5)] for b in range(5)]
    answers = artifact(tmp_path, "select", "key", {"rewrites.jsonl": '{"reason": "", "id": "a"}\n'})
    scores = artifact(tmp_path, "score", "key", {"scores.json": json.dumps({"pruning": {"mean": distances}})})
    found = run() | {"store": str(tmp_path), "artifacts": {"select": ["key"], "score": "key"}}
    assert page.examples([found]) and heat_maps([found]).figures
    (answers / "rewrites.jsonl").unlink()
    (scores / "scores.json").unlink()
    assert not page.examples([found]) and not heat_maps([found]).figures


def test_nothing_to_report_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no finished run" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_offline_wandb_run_holds_every_point_of_every_curve(tmp_path: Path) -> None:
    """Read back from the file that `wandb sync` would upload."""
    runs = grid()
    found = publish(runs, [("s1", "failed", "no room")], tmp_path)
    settings = {"project": "p", "entity": None, "group": "g", "tags": [], "mode": "offline"}
    node = {"_target_": "sddx.tracking.loggers.wandb", "_partial_": True, **settings}
    assert to_loggers(runs, found, tmp_path, {"wandb": node}) == ["wandb"]
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = history(file)
    (family,) = families(runs)
    for measure in MEASURES:
        for arm in family.arms:
            logged = [(row["removed"], row[key]) for row in rows if (key := f"removed/{measure}/{arm}") in row]
            assert logged == [(point.x, point.interval.estimate) for point in family.curve(arm, measure)]
            assert any(f"plots/removed/{measure}" in key for row in rows for key in row)
    keys = {key for row in rows for key in row}  # a table is one value or several under its name
    assert all(any(key.startswith(f"tables/{name}") for key in keys) for name in rows_of(found))
    assert any(record.WhichOneof("record_type") == "request" or record.artifact.name for record in records(file))


def test_every_logger_shows_of_a_report_what_it_can(tmp_path: Path) -> None:
    """Every point as a scalar at its place on the axis, with its interval; TensorBoard draws the curves and holds
    tables and page as texts, MLflow holds figures, tables and pages."""
    from mlflow.tracking import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs, uri = grid(), f"sqlite:///{tmp_path}/m.db"
    found = publish(runs, [], tmp_path)
    of_mlflow = {"uri": uri, "experiment": "e", "group": "g", "tags": []}
    made = {"csv": {}, "tensorboard": {}, "mlflow": of_mlflow}
    nodes = {
        name: {"_target_": f"sddx.tracking.loggers.{name}", "_partial_": True, **settings}
        for name, settings in made.items()
    }
    assert to_loggers(runs, found, tmp_path, nodes, group="g") == list(made)
    assert to_loggers(runs, found, tmp_path, nodes, seen=["mlflow"]) == ["csv", "tensorboard"]
    (family,) = families(runs)
    wanted = {
        f"removed/{measure}/{arm}{end}": [(p.x, getattr(p.interval, side)) for p in family.curve(arm, measure)]
        for measure in MEASURES
        for arm in family.arms
        for end, side in (("", "estimate"), ("/low", "low"), ("/high", "high"))
    }
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    with (tmp_path / "csv/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, points in wanted.items():
        near = [(x, pytest.approx(y, rel=1e-6)) for x, y in points]
        assert [(event.step, event.value) for event in board.Scalars(name)] == near
        assert sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)) == near
        assert [(int(row["removed"]), float(row[name])) for row in rows if row[name]] == near
    assert {f"plots/removed/{measure}" for measure in MEASURES} <= set(board.Tags()["images"])
    texts = board.Tags()["tensors"]
    assert {f"tables/{name}/text_summary" for name in rows_of(found)} <= set(
        texts
    ) and "report/text_summary" in texts
    kept = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert {
        "report.html",
        "report.md",
        "report.csv",
        "figures",
        "tables",
    } <= kept and run.info.run_name == "report-g"
    assert len(client.list_artifacts(run.info.run_id, "figures")) == sum(len(s.figures) for s in found["sections"])


def test_places_between_whole_numbers_are_counted() -> None:
    """A step is a whole number; an axis need not be one."""
    at = {"sdd": [Point(x, Interval(x, x, x, "seeds"), 1) for x in (0.0, 0.25, 1.0)]}
    assert [(x, step) for x, step, _ in _scalars("a", at)] == [(0.0, 0), (0.25, 1), (1.0, 2)]
    at = {"sdd": [Point(x, Interval(x, x, x, "seeds"), 1) for x in (2, 5)]}
    assert [step for _, step, _ in _scalars("a", at)] == [2, 5]


def test_the_dashboard_draws_what_runs_log() -> None:
    """Every axis and measure has its panel, over the names that a run's config and summary use."""
    pytest.importorskip("wandb_workspaces")
    made = workspace("me", "sddx", ["gsm8k"])
    titles = [section.name for section in made.sections]
    assert titles == [
        *(f"Over {label}" for label in AXES.values()),
        "Without training",
        "By arm",
        "Per task",
        "Cost",
    ]
    drawn = [panel for section in made.sections for panel in section.panels]
    scattered = [(panel.x.name, panel.y.name) for panel in drawn if hasattr(panel, "running_ymean") and panel.x]
    assert {(axis, measure) for axis in AXES for measure in MEASURES} <= set(scattered)
    assert {("removed", measure) for measure in KEPT} <= set(scattered)
    assert made.sections[-2].panels[0].metrics[0].name == "scores.recovered.gsm8k"


def test_the_notebook_draws_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs from top to bottom over the runs of a sweep and draws one figure and one table."""
    import nbformat
    from nbclient import NotebookClient

    for number, found in enumerate(grid()):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "summary.json").write_text(json.dumps(found))
    monkeypatch.setenv("SDDX_RUNS", str(tmp_path))
    path = Path(__file__).parents[1] / "notebooks" / "scaling_curves.ipynb"
    done = NotebookClient(nbformat.read(path, as_version=4), timeout=120).execute()
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs[0].text == "12 runs, 1 families of curves\n"
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert sum("text/markdown" in output.get("data", {}) for output in outputs) == 1


def test_a_whole_number_is_the_same_choice_with_and_without_its_point() -> None:
    """A default says 1.0, a command line 1: both stand on one curve."""
    runs = [run(seed=0, removed=2, shift=1.0), run(seed=1, removed=3, shift=1)]
    (family,) = families(runs)
    assert [point.x for point in family.curve("sft", "recovery")] == [2, 3] and family.fixed == ""


def likely(bits: float) -> dict:
    """What a summary says of one model's likelihoods, of a task with choices and of one without."""
    return {
        "bits_per_byte": {"held": bits, "other": bits + 1, "average": bits + 0.5},
        "margin": {"held": -bits, "average": -bits},
    }


def test_likelihoods_stand_beside_scores() -> None:
    """Each model's, with its difference to the unpruned one: means over seeds on the page, a run's in its table."""
    models = [{"unpruned": likely(1.0), "pruned": likely(2.0), "recovered": likely(1.25 + s)} for s in (0.0, 0.5)]
    runs = [run(seed=seed) | {"likelihoods": found} for seed, found in enumerate(models)]
    rows = rows_of(page.contents(runs, []))["likelihoods"]
    assert ["all runs", "pruned", "held", "2.000", "+1.000", "-2.000", "-1.000"] in rows
    assert ["all runs", "sft", "average", "2.000", "+0.500", "-1.500", "-0.500"] in rows
    assert ["all runs", "sft", "other", "2.500", "+0.500", "-", "-"] in rows
    said = dict(table.lines(runs[0]))
    assert said["bits per byte, right answers"] == "unpruned 1.500, pruned 2.500 (+1.000), recovered 1.750 (+0.250)"
    assert said["margin, right answers"].endswith("recovered -1.250 (-0.250) nats")
    assert "likelihoods" not in rows_of(page.contents(grid(), []))


def test_what_counts_chance_does_not_lead() -> None:
    """The share of the gap that was closed stands before raw recoveries, and what stands apart says so."""
    header = page.arm_table(grid())["header"]
    assert header.index("gap closed") < header.index("untrained") < header.index("recovery")
    apart = run() | {"apart": ["other"], "standard_errors": {}}
    assert [label for label, _ in table.lines(apart)][0] == "gap closed"
    assert [row[0] for row in table.rows(apart)] == ["trained *", "held", "other (apart)", "average"]
    assert "other (apart)" in task_table([apart])["header"]
    assert table.is_choosing(apart | {"choices": {"side": "selection"}})


def test_what_was_written_stands_beside_what_was_refused() -> None:
    """Means over the runs of an arm; runs of an earlier version, which do not say, have dashes."""
    surprise = [{"unpruned": {"self": own, "reference": own + 1}, "pruned": {}} for own in (1.0, 2.0)]
    same = {"cut_off": 0.1, "rouge_l": 0.5, "words": {"self": 80, "reference": 40}, "sample": 9}
    written = [{**same, "copied": share, "surprise": of} for share, of in zip((0.2, 0.4), surprise, strict=True)]
    runs = [run("sdd", seed) | {"written": found} for seed, found in enumerate(written)]
    (row,) = page.funnel_table([*runs, run("sft")])["rows"]
    assert row[1:] == ["sdd", "90.0 %", "10.0 %", "30.0 %", "10.0 %", "0.50", "80", "40", "1.50", "2.50"]
    (row,) = page.funnel_table([run("sdd"), run("sft")])["rows"]
    assert row[1:] == ["sdd", "90.0 %", "10.0 %", *["-"] * 7]


DATA, SEEDS = ("dataset=a", "dataset=b"), ("seed=0", "seed=1")


def merged_run(share: object, students: tuple[str, ...] = DATA, seed: int = 0, mixed: bool = True) -> dict:
    """A run that merged its own student, the second of these, with the first."""
    found = run(seed=seed, **{"merging.method.t": share, "merging.students": [*students]})
    names = {"unpruned": "reference", "pruned": "cut", "recovered": "student", students[0]: "parent"}
    names |= {"mixed": "mixed"} if mixed else {}
    levels = dict(zip([*names, "merged"], [1.0, 0.4, 0.7, 0.6, 0.8], strict=False))
    levels["merged"] = 0.6 + 0.2 * share + seed / 100 if isinstance(share, float) else 0.6
    found["subjects"] = [{"name": name, "role": role} for name, role in {**names, "merged": "merged"}.items()]
    found["scores"] = {name: {task: levels[name] for task in [*TASKS, "average"]} for name in levels}
    measures = ("recovery", "recovery_trained", "recovery_held_out", "gap_closed", "recovery_low", "recovery_high")
    found["recoveries"] = {name: dict.fromkeys(measures, levels[name]) for name in levels if name != "unpruned"}
    return found


def test_merges_are_drawn_over_the_share_between_their_students() -> None:
    """The first student at 0 and the second at 1, whichever of them is the run's own; seeds make the interval."""
    runs = [merged_run(share, seed=seed) for share in (0.25, 0.75) for seed in (0, 1)]
    runs += [merged_run(share, SEEDS, mixed=False) for share in (0.25, 0.75)] + [merged_run([0.1, 0.2])]
    one, two = merges(runs)
    assert [(p.x, p.interval.estimate) for p in one.ends("recovery")] == [(0.0, 0.6), (1.0, 0.7)]
    points = one.over_share("recovery_held_out")
    assert [(p.x, p.seeds) for p in points] == [(0.25, 2), (0.75, 2)]
    assert points[0].interval == t_interval([0.65, 0.66])
    assert (mixed := one.mixed("recovery")) and mixed.interval.estimate == 0.8 and two.mixed("recovery") is None
    assert (one.name, two.name) == ("dataset=a to dataset=b", "seed=0 to seed=1")
    section, gains = merge_sections(runs)
    assert [figure.title for figure in section.figures] == list(MEASURES.values())
    shown = ["seed=0 to seed=1", "merged, t = 0.75", "75.0 %", "75.0 % to 75.0 % over items", "1"]
    assert (table := section.figures[2].table) and shown in table["rows"]
    # The students bring back 0.6 and 0.7, one of all rows 0.8, the merged ones 0.65 and 0.66.
    first = ["merged, t = 0.25", "+0.5 (-5.9 to +6.9), 2 seeds"]
    assert gains.table and gains.table["rows"][0][1::2] == first
    assert gains.table["rows"][0][4] == "-14.5 (-20.9 to -8.1), 2 seeds"
    assert {row[0] for row in gains.table["rows"]} == {one.name}  # two has one seed


def control_run(share: float, seed: int) -> dict:
    """A run that merged its own student with one of another seed, which it named by its own."""
    made = merged_run(share, ("seed=1${seed}", "seed=${seed}"), seed, mixed=False)
    for held in (made["recoveries"], made["scores"]):
        held[f"seed=1{seed}"] = held.pop("seed=1${seed}")
    made["subjects"] = [{**each, "name": each["name"].replace("${seed}", str(seed))} for each in made["subjects"]]
    made["artifacts"] = {"train": str(seed), "model": "m"}
    return made


def test_students_that_the_seed_names_are_one_merge() -> None:
    """The control pairs two seeds anew at every seed: one line with an interval over seeds, not one a seed, and one
    row for the other student in all tables."""
    runs = [control_run(share, seed) for seed in (0, 1) for share in (0.25, 0.5)]
    (merge,) = merges(runs)
    assert merge.name == "seed=1${seed} to seed=${seed}"
    assert [point.seeds for point in [*merge.ends("recovery"), *merge.over_share("recovery")]] == [2] * 4
    assert gains(merge.kinds["merged, t = 0.25"], "recovery", merge.own) == pytest.approx([0, 1])
    (parent,) = [row for row in scores(runs, "average") if row.role == "parent"]
    assert parent.model == "sft, seed=1${seed}" and len(parent.seeds) == 2


def test_methods_without_a_share_are_told_beside_others() -> None:
    """And those with a share for each block, each by itself."""
    ties = merged_run(None)
    runs = [merged_run([0.1, 0.9]), merged_run([0.9, 0.1])]
    runs.append(ties | {"choices": {**ties["choices"], "merging": "ties"}})
    section, _ = merge_sections(runs)
    names = [row[1] for row in section.table["rows"] if row[1].startswith("merged")] if section.table else []
    assert sorted(names) == ["merged", "merged, t = [0.1, 0.9]", "merged, t = [0.9, 0.1]"]


def test_a_student_counts_once_however_often_it_is_merged() -> None:
    """Tables and differences of arms that are merged at several shares, and beside them not: each student, and the
    pruned model, in one row, and what is merged under its arm's name."""
    runs = []
    for loss in ("sft", "sdd"):
        for seed in (0, 1):
            for share in (0.25, 0.5, 0.75):
                one = merged_run(share, seed=seed)
                one["choices"]["loss"], one["artifacts"] = loss, {"train": f"{loss}{seed}", "model": "m"}
                runs.append(one)
            plain = {name: each for name, each in one["choices"].items() if not name.startswith("merging")}
            runs.append({**run(loss, seed), "choices": plain, "artifacts": one["artifacts"]})
    (difference,) = differences(runs)
    assert difference.seeds == 2 and [row[1:4] for row in page.arm_table(runs)["rows"]] == [
        ["sft", "-", "2"], ["sdd", "-", "2"]
    ]  # fmt: skip
    labels = [row[1] for row in task_table(runs)["rows"]]
    assert [labels.count(name) for name in ("unpruned", "pruned", "sft", "sdd")] == [1] * 4
    assert [labels.count(f"{arm}, {name}") for arm in ("sft", "sdd") for name in ("merged", "mixed")] == [3, 1] * 2


def test_one_share_is_told_and_not_drawn() -> None:
    section, gains = merge_sections([merged_run(0.5)])
    assert gains.table and not gains.table["rows"]
    assert not section.figures and section.table and section.table["rows"][-1][:3] == [
        "dataset=a to dataset=b", "merged, t = 0.5", "70.0 %"
    ]  # fmt: skip
