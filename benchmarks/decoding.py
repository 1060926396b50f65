"""Writing and judging against the libraries' own: `python benchmarks/decoding.py`.

Writing: tokens per second over those of `generate` on batches of 16 in the order of the prompts (goal: 4).
Judging: seconds of lm-eval's HFLM on batches of 32 over ours, for the same log-likelihoods (goal: 1.5), by tasks.
Pairs alternate; the median of their ratios counts. `--model` names another folder than the embedded model's,
`--prompts` a file of instructions in Alpaca's format, `--tasks` a folder with rows of hellaswag, arc_easy and piqa
(JSON lines, in the columns that lm-eval reads); without them sums are asked for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from sddx.data.checkers import last_number
from sddx.data.encode import render, token_ids
from sddx.data.selfdata import end_ids
from sddx.evaluation.prompts import SameTokensHFLM
from sddx.models.decoding import greedy, write
from sddx.models.generation import neutral
from sddx.models.load import load_model, load_tokenizer
from sddx.tiny import data

CHECKPOINT = Path(data.__file__).parent / "checkpoint"
Pairs = list[tuple[str, str]]


def sums(count: int) -> list[Any]:
    how = {"skill": "arithmetic", "shift": 1.0, "seed": 0, "check": last_number, "rewrite": "tiny", "trains": []}
    return data.dataset(size=count, **how).examples


def prompts(file: Path | None, count: int) -> list[str]:
    if file is None:
        return [row.prompt for row in sums(count)]
    rows = json.loads(file.read_text(encoding="utf-8"))[:count]
    return ["\n".join(filter(None, (row["instruction"], row.get("input")))) for row in rows]


def choices(folder: Path | None, count: int) -> dict[str, Pairs]:
    """By task its (context, continuation), one for each choice of an item, in lm-eval's own words."""
    if folder is None:
        return {"sums": [(row.prompt, f" {answer}") for row in sums(count) for answer in (1, 12, 20, 144)]}
    makers = {"hellaswag": _hellaswag, "arc_easy": _arc, "piqa": _piqa}
    found = {}
    for task, make in makers.items():
        lines = (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        found[task] = [pair for line in lines for pair in make(json.loads(line))]
    return found


def _hellaswag(row: dict[str, Any]) -> Pairs:
    from lm_eval.tasks.hellaswag.utils import preprocess

    text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return [(preprocess(text), f" {preprocess(ending)}") for ending in row["endings"]]


def _arc(row: dict[str, Any]) -> Pairs:
    return [(f"Question: {row['question']}\nAnswer:", f" {choice}") for choice in row["choices"]["text"]]


def _piqa(row: dict[str, Any]) -> Pairs:
    return [(f"Question: {row['goal']}\nAnswer:", f" {row[name]}") for name in ("sol1", "sol2")]


def by_generate(model: Any, asked: list[list[int]], ends: list[int], new: int, size: int = 16) -> int:
    """Write by transformers' own loop; the tokens up to each row's end."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=ends, pad_token_id=0)
    tokens = 0
    for first in range(0, len(asked), size):
        rows = asked[first : first + size]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with neutral(model):
            whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for row in whole[:, width:].tolist():
            tokens += next((place for place, token in enumerate(row, 1) if token in ends), len(row))
    return tokens


def rate(work: Callable[[], int]) -> float:
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def judged(lm: HFLM, pairs: Pairs) -> int:
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    return len(lm.loglikelihood(asked, disable_tqdm=True))


def compare(name: str, ours: Callable[[], int], other: Callable[[], int], unit: str) -> dict[str, Any]:
    pairs = [(rate(ours), rate(other)) for _ in range(3)]
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    for mine, theirs in pairs:
        print(f"{name}: {mine:,.1f} {unit}/s against {theirs:,.1f}: {mine / theirs:.2f}", flush=True)
    print(f"{name}: median ratio {ratio:.2f}", flush=True)
    return {"ratio": ratio, "pairs": pairs, "unit": unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--rows", type=int, default=256, help="prompts to answer")
    parser.add_argument("--items", type=int, default=400, help="items of each task")
    parser.add_argument("--new", type=int, default=64, help="tokens in an answer")
    parser.add_argument("--batch", type=int, default=128, help="rows that write_answers writes at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = load_model(given.model, dtype=given.dtype), load_tokenizer(given.model)
    ends = end_ids(model, tokenizer)
    asked = token_ids(tokenizer, [render(tokenizer, prompt) for prompt in prompts(given.prompts, given.rows)])
    how = {"max_new_tokens": given.new, "batch_size": given.batch, "ends": ends}
    found = {
        "writing": compare(
            "writing",
            lambda: sum(map(len, write(model, asked, greedy, **how))),
            partial(by_generate, model, asked, ends, given.new),
            "tokens",
        )
    }
    lms = [
        kind(pretrained=model, tokenizer=tokenizer, batch_size=32, softmax_dtype="float32")
        for kind in (SameTokensHFLM, HFLM)
    ]
    for task, pairs in choices(given.tasks, given.items).items():
        ours, other = (partial(judged, lm, pairs) for lm in lms)
        found[task] = compare(task, ours, other, "requests")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
