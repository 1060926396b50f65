"""Rows of the same prompts by different writers: `python docs/results/writers.py SWEEP OTHER TO`.

SWEEP is a folder of `+sweeps=real_written`, of which the runs on Alpaca are read; OTHER a file of Alpaca's columns
in which another model answered the same prompts; TO the folder that gets the rows of each writer: `reference`,
`other`, `self` (the unpruned model with the reference shown), `checked` (the same where it passed the check, the
reference elsewhere: what SDD trains on), `plain` (without the reference) and `wrong` (with another row's).

Kept are the prompts to which all wrote whole answers, none of which copies another. In `TO/matched` are those of
them whose reference, other and self have like lengths: the longest at most 1.5 times the words of the shortest.
"""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

from sddx.data import checkers
from sddx.data.selfdata import Answer, distil
from sddx.data.shards import read_rows
from sddx.data.sources import jsonl
from sddx.data.templates import leaks
from sddx.data.written import COPIED, rouge_l
from sddx.pipeline import Run
from sddx.records import ANSWERS_FILE, REWRITES_FILE, Rewrite
from sddx.report.table import grid
from sddx.run_folder import SUMMARY, read_config
from sddx.runtime import Runtime
from sddx.store import Store
from sddx.train import method

MATCHED, LONGER = ("reference", "other", "self"), 1.5
Texts = dict[str, str]  # by prompt


def of_alpaca(sweep: Path) -> list[dict[str, Any]]:
    """The configurations of the finished runs on Alpaca."""
    configs = [read_config(file.parent) for file in sorted(sweep.glob(f"*/{SUMMARY}"))]
    return [config for config in configs if config["choices"]["dataset"] == "alpaca"]


def written(config: dict[str, Any]) -> dict[str, Texts]:
    """What the unpruned model wrote in a run, whole answers alone, under the name of its writer; and beside what it
    wrote with the right reference, that reference and what the run's check makes of both."""
    run = Run(Store(Path(config["store"])), Runtime(quiet=True), method(config))
    rewrites = read_rows(Rewrite, *(shard.path / REWRITES_FILE for shard in run.rows[1:]))
    answers = read_rows(Answer, *(shard.path / ANSWERS_FILE for shard in run.answers[1:]))
    pairs = zip(rewrites, answers, strict=True)
    whole = {row.prompt: one.text for row, one in pairs if one.text and not one.fault and not leaks(one.text)}
    if config["choices"]["loss"] == "sdd_plain":
        return {"plain": whole}
    if config["selfdata"]["reference"] == "wrong":
        return {"wrong": whole}
    found = {"self": whole, "reference": {row.prompt: row.reference for row in rewrites}}
    if config["selfdata"]["check"] == "open":
        found["checked"] = {row.prompt: row.response for row in distil(rewrites, fallback="reference")}
    return found


def other(path: str) -> Texts:
    """What another model wrote."""
    rows = jsonl(
        path=path,
        prompt="{instruction}\n{input}",
        response="output",
        size=None,
        seed=0,
        check=checkers.none,
        rewrite="instruction",
    )
    return {example.prompt: example.response for example in rows.examples}


def apart(writers: dict[str, Texts]) -> list[str]:
    """The prompts to which all wrote, none a copy of another's answer."""
    alone = [texts for name, texts in writers.items() if name != "checked"]
    common = [prompt for prompt in writers["reference"] if all(prompt in texts for texts in alone)]
    pairs = {prompt: combinations([texts[prompt] for texts in alone], 2) for prompt in common}
    return [prompt for prompt in common if all(rouge_l(a, b) < COPIED for a, b in pairs[prompt])]


def are_alike(texts: list[str]) -> bool:
    """Whether the answers have like numbers of words."""
    words = [len(text.split()) for text in texts]
    return max(words) <= LONGER * min(words)


def write(writers: dict[str, Texts], prompts: list[str], to: Path) -> None:
    """A file of rows for each writer."""
    to.mkdir(parents=True, exist_ok=True)
    for name, texts in writers.items():
        rows = [json.dumps({"prompt": prompt, "response": texts[prompt]}) + "\n" for prompt in prompts]
        (to / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    words = {name: mean(len(texts[prompt].split()) for prompt in prompts) for name, texts in writers.items()}
    print(grid(["writer", f"words, {len(prompts)} rows"], [[n, f"{each:.0f}"] for n, each in words.items()]), "\n")


if __name__ == "__main__":
    sweep, others, to = sys.argv[1:]
    writers = {"other": other(others)}
    for config in of_alpaca(Path(sweep)):
        writers |= written(config)
    prompts = apart(writers)
    write(writers, prompts, Path(to))
    alike = [prompt for prompt in prompts if are_alike([writers[name][prompt] for name in MATCHED])]
    if alike:
        write({name: writers[name] for name in MATCHED}, alike, Path(to) / "matched")
