"""Rows that are held out from training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sddx.data.remarks import remark, setting
from sddx.errors import UserError
from sddx.records import Example


def with_held_out(dataset: Mapping[str, Any], validation: int) -> dict[str, Any]:
    """The node of a data set whose `size` counts the rows to train on, asked for the held-out rows as well."""
    return {**dataset, "size": dataset["size"] and dataset["size"] + validation}


def hold_out(examples: Sequence[Example], validation: int) -> tuple[list[Example], list[Example]]:
    """The first `validation` examples, and of those after them the ones that repeat no prompt of theirs, whatever
    they answer: a prompt that was trained on says nothing of what a model learned. Raises UserError where none is
    left to train on."""
    held_out = list(examples[:validation])
    known = {canonical(example.prompt) for example in held_out}
    training = [each for each in examples[validation:] if canonical(each.prompt) not in known]
    if not training:
        raise UserError(
            f"The dataset has {len(examples)} rows and validation={validation} of them are held out, so none is "
            f"left to train on. Lower validation, or give more rows ({setting('size')})."
        )
    if repeated := len(examples) - len(held_out) - len(training):
        remark(
            f"{repeated} rows repeat a prompt of the {len(held_out)} held-out rows and are not trained on, "
            f"{len(training)} others are"
        )
    return held_out, training


def canonical(prompt: str) -> str:
    """A prompt without what makes no other question of it: case, and the amount of white space."""
    return " ".join(prompt.casefold().split())
