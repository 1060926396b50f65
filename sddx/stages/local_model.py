"""A run's model where it is on this machine, as far as checks look at it: without its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

Check = Callable[[], Any]


@dataclass(frozen=True)
class LocalModel:
    """The unpruned model's folder, and in what it is loaded."""

    folder: Path
    dtype: str
    attention: str

    @cached_property
    def config(self) -> Any:
        """The configuration of its text model."""
        from sddx.models.load import text_config

        return text_config(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        """Raises UserError where there is none that can be read."""
        from sddx.models.load import load_tokenizer

        return load_tokenizer(self.folder)

    @cached_property
    def ending(self) -> Any:
        """How an answer ends in the model's own chat form. Raises UserError where prompts and answers cannot be put
        into it, or not be told apart there."""
        from sddx.data.encode import ending

        return ending(self.tokenizer)

    def bare(self) -> Any:
        """The model without weights, anew at every call."""
        from sddx.estimate.skeleton import skeleton

        return skeleton(self.config, self.dtype)
