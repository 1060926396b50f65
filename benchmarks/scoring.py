"""What scoring and patching cost: `python benchmarks/scoring.py [--json FILE]`, on a random Llama.

All metrics of one forward pass against a bare pass without the head over the same data (goal: at most 1.25 times);
peak memory with four times the data (goal: flat); Shapley with shared prefixes against without, at equal orders
(goal: at most 0.6 of the time); memory of the linear patch for a width of 4,096 over 65,536 tokens (goal: below
2 GB). The model has 16 blocks of 512. Ratios within one run; two threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from llama import random_llama
from memory import peak

from sddx.compression.patches import Linear
from sddx.importance.ablation import Shapley
from sddx.importance.coalitions import Loss
from sddx.importance.metrics import angular_distance, block_influence, norm_ratio, update_norm
from sddx.importance.score import Subject, score_units
from sddx.records import Batch, Units
from sddx.runtime import Runtime

METRICS = {
    "angular": partial(angular_distance, tokens="all"),
    "block_influence": block_influence,
    "norm_ratio": norm_ratio,
} | {f"l{o}{r}": partial(update_norm, order=o, relative=r) for o in (1, 2) for r in (True, False)}


def subject(batches: int, *, rows: int = 8, length: int = 256) -> Subject:
    model, data = random_llama(), []
    for _ in range(batches):
        ids = torch.randint(32_000, (rows, length))
        labels = ids.roll(-1, 1)
        labels[:, -1] = -100
        data.append(Batch(ids, torch.ones_like(ids), labels))
    return Subject(model, None, Units("blocks", 16), data, Runtime(quiet=True))


@torch.inference_mode()
def bare(given: Subject) -> None:
    for batch in given.batches:
        given.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def one_pass(repeats: int = 5) -> dict[str, float]:
    given = subject(2)
    score_units(given, METRICS)
    pairs = [(seconds(lambda: score_units(given, METRICS)), seconds(lambda: bare(given))) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    print(
        f"{len(METRICS)} metrics in one pass: {statistics.median(a for a, _ in pairs):.2f} s against a bare pass "
        f"{statistics.median(b for _, b in pairs):.2f} s: ratio {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    return {"metrics_over_bare": statistics.median(ratios)}


def shapley() -> dict[str, float]:
    given, figures = subject(1, rows=4, length=128), {}
    for name, keep in (("all", 0.0), ("70", 0.7)):
        spent = {}
        for reuse in (True, False):
            metric = Shapley(value=Loss(reuse=reuse), keep=keep, orders=8)
            spent[reuse] = seconds(lambda metric=metric: metric.measure(given))
        figures[f"shapley_{name}_shared_over_without"] = spent[True] / spent[False]
        print(
            f"shapley, keep {keep}: {spent[True]:.1f} s with shared prefixes, {spent[False]:.1f} s without: "
            f"ratio {spent[True] / spent[False]:.2f}"
        )
    return figures


def memory(batches: int) -> float:
    """GiB of a process that scores so many batches."""
    script = f"from scoring import *; given = subject({batches}); score_units(given, METRICS); print(peak() / 1024)"
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=sys.path[0], capture_output=True, text=True, check=True
    )
    return float(printed.stdout)


def linear_patch(width: int = 4096, tokens: int = 65_536, batch: int = 4096) -> dict[str, float]:
    before, start, fit = peak(), time.perf_counter(), Linear()
    for _ in range(tokens // batch):
        x = torch.randn(batch, width)
        fit.see(x, x + 0.1 * x.roll(1, 1))
    fit.solve()
    spent = time.perf_counter() - start
    more = (peak() - before) / 1024
    print(f"linear patch, width {width}, {tokens:,} tokens: {more:.2f} GiB more, {spent:.0f} s")
    return {"patch_gib": more}


def flat() -> dict[str, float]:
    """Over as many texts as are read at once, and over four times as many."""
    few, many = memory(4), memory(16)
    print(f"peak memory of scoring: {few:.2f} GiB over 32 texts, {many:.2f} over 128: ratio {many / few:.3f}")
    return {"memory_over_four_times": many / few}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked = parser.parse_args()
    torch.set_num_threads(2)
    figures = linear_patch()  # first: the peak of a process never falls
    figures |= one_pass() | shapley() | flat()
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
