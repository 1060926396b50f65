"""Fine-tuning sets and held-out text of the embedded world."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Literal

from sddx.data.remarks import setting
from sddx.errors import UserError
from sddx.records import Count, Dataset, Example, Seed, Share
from sddx.tiny.corpus import STYLED, documents
from sddx.tiny.dice import Dice
from sddx.tiny.skills import Item, items

MOST_TEXTS = 100_000  # minutes of writing; no measure needs more
LARGEST = 8500  # up to 8,000 to train on, and the rows that are held out for the validation loss


def dataset(
    *,
    skill: str,
    shift: Share,
    size: Count,
    seed: Seed,
    check: Callable[[str, str], bool],
    rewrite: str,
    trains: Sequence[str],
) -> Dataset:
    """`size` prompts of one skill with reference answers.

    `shift` is the style dial of the embedded world: the share of references in the foreign style, from 0 (all
    in the model's own style, the negative control) to 1. A row that is foreign at one shift is so at every
    larger one. Raises UserError for a skill without a foreign style, a shift outside 0..1, too large a size.
    """
    if skill not in STYLED:
        raise UserError(f"dataset.skill={skill!r} has no reference answers. Use one of {', '.join(STYLED)}.")
    if not 0 <= shift <= 1:
        raise UserError(f"dataset.shift={shift} is no share. Give a number from 0 to 1.")
    if not 1 <= size <= LARGEST:
        raise UserError(
            f"{size} rows of {skill} (dataset.size, and those held out for validation) were asked for. "
            f"Give a dataset.size that keeps them within 1 to {LARGEST}."
        )
    drawn = islice(items(skill, "finetune", seed), size)
    return Dataset([_example(item, shift) for item in drawn], check, rewrite, tuple(trains))


def _example(item: Item, shift: float) -> Example:
    foreign = Dice(f"shift/{item.prompt}").chance(shift)
    identity = hashlib.sha256(item.prompt.encode()).hexdigest()[:16]
    return Example(identity, item.prompt, item.reference if foreign else item.answer)


def conversations(
    *, split: Literal["finetune", "calibration", "text", "selection", "report"], size: Count, seed: Seed
) -> list[str]:
    """Rendered conversations of the pretraining mixture from a split that was not trained on. `calibration` and
    `text` are the two parts of held-out text, without a question in common at any size and seed. Raises UserError
    for more than MOST_TEXTS."""
    if not 1 <= size <= MOST_TEXTS:
        raise UserError(f"{setting('size')}={size} texts were asked for. Give 1 to {MOST_TEXTS}.")
    return [prompt + answered for prompt, answered in documents(split, size, seed)]
