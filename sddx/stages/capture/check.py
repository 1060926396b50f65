"""What capturing a teacher refuses before any work."""

from __future__ import annotations

from typing import Any

from sddx.config.build import Settings, made, tried
from sddx.errors import UserError
from sddx.stages.local_model import Check, LocalModel

ROWS, VOCABULARY = 5, 7  # of the numbers on which terms are tried


def of_settings(method: Settings) -> list[Check]:
    """The loss can be had from what is captured."""
    return [lambda: _check_loss(method["loss"])] if method.get("teacher_cache") else []


def of_model(method: Settings, model: LocalModel) -> list[Check]:
    """There are so many tokens."""
    return [lambda: _check_size(method["teacher_cache"], model)] if method.get("teacher_cache") else []


def _check_loss(loss: Settings) -> None:
    """Terms look at a teacher, at one temperature, at its distributions alone, and on rows known beforehand. Raises
    UserError."""
    from sddx.training.objective import Objective

    objective = made(loss, Objective, "loss")
    terms = ", ".join(objective.terms) or "none"
    if not objective.needs_teacher:
        raise UserError(
            f"teacher_cache captures a teacher, and no term of the loss ({terms}) looks at one. Choose loss=kd or "
            "another with a term on the teacher's distributions, or leave out teacher_cache."
        )
    if objective.needs_states:
        raise UserError(
            f"teacher_cache holds a teacher's distributions, and {', '.join(objective.layer_terms)} looks at its "
            "hidden states, which take the model itself. Leave out teacher_cache, or choose loss=kd."
        )
    if objective.rollouts is not None:
        raise UserError(
            "teacher_cache holds what a teacher says of rows that are there before training, and this loss trains "
            "on what the student writes meanwhile. Leave out teacher_cache."
        )
    _try_terms(objective)


def _try_terms(objective: Any) -> None:
    """A term of one's own takes distributions in buckets too. Raises UserError."""
    import torch

    from sddx.training.coarse import likeliest
    from sddx.training.objective import Distilled

    student, teacher = torch.randn(2, ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    coarse, labels = likeliest(teacher, 2, objective.temperature), torch.arange(ROWS)
    for name, term in objective.terms.items():
        if isinstance(term, Distilled):
            tried(f"loss.terms.{name}.loss", term.per_token, student, labels, coarse)


def _check_size(k: int, model: LocalModel) -> None:
    if k > (vocabulary := model.config.vocab_size):
        raise UserError(
            f"teacher_cache={k} asks for more tokens than the vocabulary has ({vocabulary}). Use {vocabulary} at "
            "most; 64 hold nearly all of a distribution."
        )
