"""sddx: cut layers out of a language model, let it teach itself, measure what came back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sddx import aliases

__version__ = "0.1.0"
aliases.install()


def load(summary: str | Path, *, device: str = "cpu", dtype: str | None = None) -> tuple[Any, Any]:
    """The recovered model (in eval mode) and its tokenizer, from a run's `summary.json`, in the run's dtype unless
    another is given.

    Raises UserError where there is no such summary, or the store that the run wrote to, or the base model, is gone.
    """
    from sddx.models.load import load_tokenizer
    from sddx.students.recovered import find_own

    run = find_own(summary)
    return run.student(dtype, device).model, load_tokenizer(run.base)
