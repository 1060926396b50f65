"""The arms side by side: `python benchmarks/arms.py <multirun folder> ...`.

Reads every `summary.json` and `samples.json` below the folders and prints, per arm, the mean recoveries over
seeds, and the paired difference to SFT on the same items and seeds with its 95 % t interval over seeds.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from scipy.stats import ttest_1samp

from sddx.evaluation.statistics import Interval, holm, t_interval
from sddx.report.table import percent

SHARES = ("recovery", "recovery_trained", "recovery_held_out", "gap_closed", "fallback_share")
COUNTS = ("examples", "supervised_tokens", "steps")
Score = Callable[[dict], float]


def runs(folders: list[str]) -> dict[str, dict[int, dict]]:
    """Summaries by arm and seed."""
    found: dict[str, dict[int, dict]] = defaultdict(dict)
    for path in sorted(path for folder in folders for path in Path(folder).rglob("summary.json")):
        summary = json.loads(path.read_text())
        found[summary["choices"]["loss"]][summary["choices"]["seed"]] = summary
    return dict(found)


def average(summary: dict) -> float:
    return summary["scores"]["recovered"]["average"]


def held_out(summary: dict) -> float:
    """The average over the skills that were not trained on."""
    scores = summary["scores"]["recovered"]
    return mean(score for task, score in scores.items() if task not in (*summary["trained"], "average"))


def difference(arm: dict[int, dict], base: dict[int, dict], score: Score) -> tuple[Interval, float]:
    """Paired by seed, in points: the mean with its interval, and the p value of the same t test."""
    seeds = sorted(arm.keys() & base.keys())
    differences = [100 * (score(arm[seed]) - score(base[seed])) for seed in seeds]
    return t_interval(differences), float(ttest_1samp(differences, 0).pvalue)


def mean_of(seeds: dict[int, dict], name: str) -> float | None:
    values = [summary[name] for summary in seeds.values()]
    return None if None in values else mean(values)


def show_arms(found: dict[str, dict[int, dict]]) -> None:
    print("| arm | " + " | ".join((*SHARES, *COUNTS, "seconds")) + " |")
    print("|---|" + "---:|" * (len(SHARES) + len(COUNTS) + 1))
    for arm, seeds in found.items():
        cells = [percent(mean_of(seeds, name)) for name in SHARES]
        cells += [f"{mean_of(seeds, name):,.0f}" for name in COUNTS]
        cells.append(f"{mean(summary['seconds']['train'] for summary in seeds.values()):.0f}")
        print(f"| {arm} | " + " | ".join(cells) + " |")


def show_differences(found: dict[str, dict[int, dict]]) -> None:
    arms = [arm for arm in found if arm != "sft"]
    columns = [[difference(found[arm], found["sft"], score) for arm in arms] for score in (average, held_out)]
    adjusted = [holm([p for _, p in column]) for column in columns]
    print("\n| minus sft | average, points (95 % over seeds) | p, Holm | held-out, points | p, Holm |")
    print("|---|---:|---:|---:|---:|")
    for number, arm in enumerate(arms):
        cells = [
            f"{column[number][0].estimate:+.1f} ({column[number][0].low:+.1f} to {column[number][0].high:+.1f}) | "
            f"{p[number]:.3f}"
            for column, p in zip(columns, adjusted, strict=True)
        ]
        print(f"| {arm} | " + " | ".join(cells) + " |")


def main() -> None:
    found = runs(sys.argv[1:])
    one = next(iter(found["sft"].values()))
    scores = {model: 100 * one["scores"][model]["average"] for model in ("unpruned", "pruned")}
    print(
        f"Seeds {sorted(found['sft'])}; kept blocks {one['cut']}; average unpruned {scores['unpruned']:.1f}, ",
        end="",
    )
    print(f"pruned {scores['pruned']:.1f} (recovery {percent(one['pruned_recovery'])}).\n")
    show_arms(found)
    show_differences(found)


if __name__ == "__main__":
    main()
