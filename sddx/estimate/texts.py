"""How many rows, items and tokens a configuration is about, without loading what is not here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sddx.config.build import build
from sddx.config.shared import once
from sddx.data.encode import TEXT_BATCH, TEXT_LENGTH, render, text_spans
from sddx.data.tables import read_table
from sddx.evaluation.items import SIDES
from sddx.evaluation.task_files import files_of
from sddx.evaluation.tasks import OWN_TASKS
from sddx.files.lines import lines

CHARACTERS = 4  # a token, in English, with a vocabulary of 32,000 words or more; ours
TURN = 20  # tokens that a chat template puts around a prompt and its answer; ours
SAMPLE = 64  # rows of a local data set that lengths are taken from
LONGEST = 2.5  # the longest text, prompt or answer of a batch in mean ones, which all of it waits for; ours

Tokens = Callable[[str], float]


@dataclass(frozen=True)
class Rows:
    """Rows of a data set, and the mean tokens of a prompt in its chat template and of a reference answer."""

    count: int
    prompt: float
    answer: float


@dataclass(frozen=True)
class Texts:
    """Texts that are read: how many, and in tokens the mean length, the mean one when they are padded to the
    longest of their batch, and the longest of all."""

    count: int
    mean: float
    padded: float
    longest: int

    @property
    def side_by_side(self) -> int:
        """Texts in a batch of the longest ones."""
        return text_spans([self.longest] * TEXT_BATCH)[0][1]


# Rows, characters of a prompt, of an answer. GSM8K's training file, and samples of 2,000 rows of Alpaca and Dolly
# (whose row counts are those that their authors state), were measured.
STATED = {
    "openai/gsm8k": (7_473, 235, 287),
    "tatsu-lab/alpaca": (52_002, 81, 274),
    "databricks/databricks-dolly-15k": (15_011, 442, 358),
    "nvidia/OpenMathInstruct-2": (1_000_000, 235, 900),  # lengths are a guess of ours
}
# Bytes that `datasets` downloads of what is large, whichever part is used (conf/calibration/openwebtext.yaml).
DOWNLOADS = {"Skylion007/openwebtext": 24e9}
TEXTS = {"Salesforce/wikitext": 600, "Skylion007/openwebtext": 4_800}  # characters a text; guesses of ours


@dataclass(frozen=True)
class Items:
    """An evaluation task: items, passes an item, characters of a question with its answer and of that answer (what
    the passes of an item do not share), characters before the shots, and tokens that an answer is written in (0:
    answers are only compared)."""

    count: int
    passes: float
    characters: float
    answer: float
    preamble: float = 0
    written: float = 0


# Item counts are those of the public sets; the characters of TruthfulQA and MMLU are guesses of ours, the others
# were measured (HellaSwag's on a fifth of its items). Answers of one token share a pass, as MMLU's letters do.
TASKS = {
    "arc_challenge": Items(1_172, 4, 171, 30),
    "arc_easy": Items(2_376, 4, 136, 24),
    "piqa": Items(1_838, 2, 134, 99),
    "lambada_openai": Items(5_153, 1, 323, 7),
    "openbookqa": Items(500, 4, 72, 18),
    "boolq": Items(3_270, 1, 624, 4),
    "copa": Items(100, 2, 71, 30),
    "hellaswag": Items(10_042, 4, 363, 136),
    "truthfulqa_mc2": Items(817, 7, 150, 50, preamble=700),
    "mmlu": Items(14_042, 1, 500, 2),
    "winogrande": Items(1_267, 2, 106, 31),
    "gsm8k": Items(1_319, 1, 522, 287, written=150),
}


def rows_of(dataset: Mapping[str, Any], held_out: int, tokens: Tokens, turn: float) -> Rows:
    """A data set's rows that are trained on, after those that are `held_out` (`dataset.size` does not count these):
    as stated for those of the hub, else (generated, or in a local file) counted. A chat template adds `turn` tokens
    to a prompt."""
    size = dataset.get("size")
    if "split" in dataset and not dataset.get("data_files"):
        known = STATED.get(dataset["name"], STATED["openai/gsm8k"])
        return Rows(size or known[0] - held_out, known[1] / CHARACTERS + turn, known[2] / CHARACTERS)
    examples = build({**dataset, "size": size and size + held_out}).examples[held_out:]
    if not examples:
        return Rows(0, 0.0, 0.0)
    seen = examples[:SAMPLE]
    prompt, answer = (sum(tokens(getattr(e, part)) for e in seen) / len(seen) for part in ("prompt", "response"))
    return Rows(len(examples), prompt + turn, answer)


def texts_of(node: Mapping[str, Any], tokens: Tokens) -> Texts:
    """Texts of a `calibration` or `text` node, as they are read."""
    if "split" in node and "name" in node and not node.get("data_files"):
        mean = min(TEXTS.get(node["name"], 2_000) / CHARACTERS, TEXT_LENGTH)
        return Texts(node["size"] or 1_000, mean, min(LONGEST * mean, TEXT_LENGTH), TEXT_LENGTH)
    texts = build(node)
    lengths = [min(tokens(text), TEXT_LENGTH) for text in texts[: 8 * TEXT_BATCH]]
    batches = [lengths[first:end] for first, end in text_spans(lengths)]
    padded = sum(max(batch) * len(batch) for batch in batches) / len(lengths)
    return Texts(len(texts), sum(lengths) / len(lengths), padded, int(max(lengths)))


def items_of(task: str, data_dir: str | None = None) -> Items | None:
    """A task's items, as many as a file in `data_dir` has rows; None for one that is not known here."""
    return once(["items", task, data_dir], lambda: _items_of(task, data_dir))


def _items_of(task: str, data_dir: str | None) -> Items | None:
    if task in TASKS:
        files = files_of(task, data_dir)
        judged = files.get("") or files.get("test") or files.get("validation")
        return replace(TASKS[task], count=len(read_table(judged, "data_dir"))) if judged else TASKS[task]
    name = task.removeprefix("tiny_")
    split, skill = ("selection" if name.endswith("_selection") else "report"), name.removesuffix("_selection")
    file = OWN_TASKS / f"{skill}.{split}.jsonl"
    if task == name or not file.is_file():
        return None
    rows = [json.loads(line) for line in lines(file)]
    answers = [row.get("choices", [row["answer"]]) for row in rows]
    count = sum(map(len, answers))
    answer = sum(len(each) for choices in answers for each in choices) / count
    asked = sum(len(row["question"]) * len(choices) for row, choices in zip(rows, answers, strict=True)) / count
    return Items(len(rows), len(answers[0]), asked + answer, answer, written=0 if "choices" in rows[0] else 30)


def request(task: str, shots: Any) -> float:
    """Tokens of one request to a task, with its `shots` (of all tasks, or by task); 0 for one not known here."""
    if (items := items_of(task)) is None:
        return 0
    count = (shots.get(task) if isinstance(shots, Mapping) else shots) or 0
    return (items.preamble + items.characters * (1 + count)) / CHARACTERS


def limited(limit: Any, task: str, count: int, side: str | None = None) -> int:
    """The items of a task that are drawn, of those on a side."""
    wanted = limit.get(task) if isinstance(limit, Mapping) else limit
    count = count if side is None else round(count * SIDES[side] / sum(SIDES.values()))
    return count if wanted is None else min(wanted, count)


def counter(folder: Path | None) -> tuple[Tokens, float]:
    """Tokens of a text, and those that the chat template puts around a turn: by the tokenizer in a folder; by
    characters where there is none."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return lambda text: len(text) / CHARACTERS, TURN
    from sddx.models.load import load_tokenizer

    tokenizer = load_tokenizer(folder)

    def tokens(text: str) -> float:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return tokens, tokens(render(tokenizer, "a", "a")) - 2 * tokens("a") if tokenizer.chat_template else 0
