"""The rows that a student learns from, as stages read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sddx.config.build import build
from sddx.data.shards import read_examples, read_rows
from sddx.models.load import context_of, text_config
from sddx.records import REWRITES_FILE, Artifact, Example, Rewrite


def examples_of(shards: Sequence[Artifact], selfdata: dict[str, Any]) -> list[Example]:
    """The training examples of these shards: references as they stand, rewrites after the fallback."""
    if shards[0].stage != "select":
        return read_examples(*(shard.path for shard in shards))
    rewrites = read_rows(Rewrite, *(shard.path / REWRITES_FILE for shard in shards))
    return build(selfdata)(rewrites)


def room(folder: Path, max_length: int) -> int:
    """The tokens of a row at most: `max_length`, or the context of the model in this folder where that is less."""
    return min(max_length, context_of(text_config(folder)) or max_length)
