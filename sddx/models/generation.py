"""A model's own settings of generation, set aside: greedy is greedy whatever its generation_config.json says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sddx.models.anatomy import bare

# What a generation config knows of the vocabulary. Everything else in it (lengths, penalties, bans, forced tokens,
# beams, sampling) is a choice of how to answer, and never the model's.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextmanager
def neutral(model: Any) -> Iterator[None]:
    """In this context `model.generate` does what its arguments say: of the model's own generation config, with
    which transformers fills whatever is left unsaid, nothing is used but its special tokens, the end tokens among
    them. Afterwards the model has its config again."""
    from transformers import GenerationConfig

    held = bare(model)
    own = held.generation_config
    held.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in TOKENS})
    try:
        yield
    finally:
        held.generation_config = own
