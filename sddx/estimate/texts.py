"""How many rows, items and tokens a configuration is about, without loading what is not here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sddx.build import build
from sddx.evaluation.tasks import OWN_TASKS

CHARACTERS = 4  # a token, in English, with a vocabulary of 32,000 words or more; ours
SAMPLE = 64  # rows of a local data set that lengths are taken from

Tokens = Callable[[str], float]


@dataclass(frozen=True)
class Rows:
    """Rows of a data set, and the mean tokens of a prompt and of a reference answer."""

    count: int
    prompt: float
    answer: float


# Rows, characters of a prompt, of an answer. GSM8K's training file, and samples of 2,000 rows of Alpaca and Dolly
# (whose row counts are those that their authors state), were measured.
STATED = {
    "openai/gsm8k": (7_473, 235, 287),
    "tatsu-lab/alpaca": (52_002, 81, 274),
    "databricks/databricks-dolly-15k": (15_011, 442, 358),
    "nvidia/OpenMathInstruct-2": (1_000_000, 235, 900),  # lengths are a guess of ours
}
TEXTS = {"Salesforce/wikitext": 600, "Skylion007/openwebtext": 4_800}  # characters a text; guesses of ours


@dataclass(frozen=True)
class Items:
    """An evaluation task: items, passes an item, characters of a question with its answer, characters before the
    shots, and tokens that an answer is written in (0: answers are only compared)."""

    count: int
    passes: float
    characters: float
    preamble: float = 0
    written: float = 0


# Item counts are those of the public sets; the characters of ARC and GSM8K were measured, the others are guesses of
# ours. Four answers of one letter share a pass.
TASKS = {
    "arc_challenge": Items(1_172, 4, 171),
    "hellaswag": Items(10_042, 4, 300),
    "truthfulqa_mc2": Items(817, 7, 150, preamble=700),
    "mmlu": Items(14_042, 1, 500),
    "winogrande": Items(1_267, 2, 110),
    "gsm8k": Items(1_319, 1, 522, written=150),
}


def rows_of(dataset: Mapping[str, Any], tokens: Tokens) -> Rows:
    """A data set's rows: as stated for those of the hub, else (generated, or in a local file) counted."""
    size = dataset.get("size")
    if "split" in dataset and not dataset.get("data_files"):
        known = STATED.get(dataset["name"], STATED["openai/gsm8k"])
        return Rows(size or known[0], known[1] / CHARACTERS, known[2] / CHARACTERS)
    examples = build(dataset).examples
    seen = examples[:SAMPLE]
    prompt, answer = (sum(tokens(getattr(e, part)) for e in seen) / len(seen) for part in ("prompt", "response"))
    return Rows(len(examples), prompt, answer)


def text_tokens(node: Mapping[str, Any], tokens: Tokens, longest: int) -> tuple[int, float]:
    """Texts of a `calibration` or `text` node, and the mean tokens of one."""
    if "split" in node and "name" in node and not node.get("data_files"):
        return node["size"] or 1_000, min(TEXTS.get(node["name"], 2_000) / CHARACTERS, longest)
    found = build(node)
    seen = found[:SAMPLE]
    return len(found), min(sum(map(tokens, seen)) / len(seen), longest)


def items_of(task: str) -> Items | None:
    """A task's items; None for one that is not known here."""
    if task in TASKS:
        return TASKS[task]
    name = task.removeprefix("tiny_")
    split, skill = ("selection" if name.endswith("_selection") else "report"), name.removesuffix("_selection")
    file = OWN_TASKS / f"{skill}.{split}.jsonl"
    if task == name or not file.is_file():
        return None
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return Items(len(rows), 1 if "choices" not in rows[0] else len(rows[0]["choices"]), 120, written=30)


def limited(limit: Any, task: str, count: int) -> int:
    """The items of a task that are drawn."""
    wanted = limit.get(task) if isinstance(limit, Mapping) else limit
    return count if wanted is None else min(wanted, count)


def counter(folder: Path | None) -> Tokens:
    """Tokens of a text by the tokenizer in a folder; by its characters where there is none."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return lambda text: len(text) / CHARACTERS
    from sddx.models.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return lambda text: len(tokenizer(text)["input_ids"])
