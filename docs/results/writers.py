"""Answers of different writers to the same prompts: `python docs/results/writers.py SWEEP OTHER TO`.

SWEEP is a folder of `+sweeps=real_written`, of which the runs on Alpaca are read; OTHER a file of Alpaca's columns
in which another model answered the same prompts. A row of `TO/apart.jsonl` is a prompt with an answer by each
writer: `reference`, `other`, `self` (the unpruned model with the reference shown), `checked` (the same where it
passed the check, the reference elsewhere: what SDD trains on), `plain` (without the reference) and `wrong` (with
another row's).

Kept are the prompts to which all wrote whole answers, none of which copies another. In `TO/matched.jsonl` are those
of them whose reference, other and self have like lengths: the longest at most 1.5 times the words of the shortest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
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
from sddx.store import default_root
from sddx.sweep.plan import Kept, Lacking
from sddx.train import method

ALONE = ("reference", "other", "self", "plain", "wrong")  # whose answers may not copy each other
WRITERS = (*ALONE, "checked")
MATCHED, LONGER = ("reference", "other", "self"), 1.5
Texts = dict[str, str]  # by prompt


def of_alpaca(sweep: Path) -> list[dict[str, Any]]:
    """The configurations of the finished runs on Alpaca."""
    configs = [read_config(file.parent) for file in sorted(sweep.glob(f"*/{SUMMARY}"))]
    return [config for config in configs if config["choices"]["dataset"] == "alpaca"]


def written(config: dict[str, Any]) -> dict[str, Texts]:
    """What the unpruned model wrote in a run, whole answers alone, under the name of its writer; and beside what it
    wrote with the right reference, that reference and what the run's check makes of both. Raises Lacking where the
    store has it no more."""
    store = Kept(Path(config["store"] or default_root()), config["accept"])
    run = Run(store, Runtime(quiet=True), method(config))
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
    columns = {"prompt": "{instruction}\n{input}", "response": "output"}
    rows = jsonl(path=path, **columns, size=None, seed=0, check=checkers.none, rewrite="instruction")
    return {example.prompt: example.response for example in rows.examples}


def apart(writers: dict[str, Texts]) -> list[str]:
    """The prompts to which all wrote, none a copy of another's answer."""
    common = [prompt for prompt in writers["reference"] if all(prompt in writers[name] for name in ALONE)]
    pairs = {prompt: combinations([writers[name][prompt] for name in ALONE], 2) for prompt in common}
    return [prompt for prompt in common if all(rouge_l(a, b) < COPIED for a, b in pairs[prompt])]


def are_alike(texts: Sequence[str]) -> bool:
    """Whether the answers have like numbers of words."""
    words = [len(text.split()) for text in texts]
    return max(words) <= LONGER * min(words)


def write(writers: dict[str, Texts], prompts: Sequence[str], to: Path) -> None:
    """The file of these prompts; how many words each writer has there is printed. Ends the program without any."""
    if not prompts:
        sys.exit(f"{to.name}: no prompt has such answers of all writers.")
    rows = [{"prompt": prompt} | {name: writers[name][prompt] for name in WRITERS} for prompt in prompts]
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [[name, f"{mean(len(row[name].split()) for row in rows):.0f}"] for name in WRITERS]
    print(grid(["writer", f"words, {len(rows)} rows of {to.name}"], words), "\n")


def main(sweep: str, others: str, to: str) -> None:
    """Write both files."""
    writers = {"other": other(others)}
    for config in of_alpaca(Path(sweep)):
        writers |= written(config)
    if lacking := [name for name in WRITERS if name not in writers]:
        sys.exit(f"{sweep} lacks finished runs that wrote {', '.join(lacking)}. Run +sweeps=real_written again.")
    prompts = apart(writers)
    write(writers, prompts, Path(to) / "apart.jsonl")
    alike = [prompt for prompt in prompts if are_alike([writers[name][prompt] for name in MATCHED])]
    write(writers, alike, Path(to) / "matched.jsonl")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Lacking as error:
        sys.exit(f"The store lacks {error} of these runs as this code makes it. Run +sweeps=real_written again.")
