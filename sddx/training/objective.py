"""What an arm is: the answers it trains on, and named loss terms with weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from sddx.config.build import tried
from sddx.errors import UserError
from sddx.records import Coarse, Cut, NonNegative, Outputs
from sddx.students.teacher import check_vocabularies
from sddx.training.coarse import alike
from sddx.training.rollouts import Rollouts

ROWS, LAYERS = 5, 3  # of the numbers on which terms are tried


@dataclass(frozen=True)
class Totals:
    """What the terms of one optimiser step are divided by, over all of its micro-batches."""

    labelled: int
    attended: int
    micro_batches: int


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """A token term on labels: `loss(logits [rows, vocabulary], labels [rows]) -> [rows]`."""

    loss: Callable[[Tensor, Tensor], Tensor]
    weight: NonNegative = 1.0

    def per_token(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | Coarse | None) -> Tensor:
        """The loss of each labelled token: [rows]."""
        return self.loss(logits, labels)


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """A token term on the teacher's logits: `loss(student, teacher [rows, vocabulary]) -> [rows]`. Where a teacher
    is known by its likeliest tokens alone, both are given in the same buckets (`coarse.alike`)."""

    loss: Callable[[Tensor, Tensor], Tensor]
    weight: NonNegative = 1.0

    @property
    def temperature(self) -> float:
        """The temperature at which its loss softens both distributions; 1 where it has none."""
        parameter = signature(self.loss).parameters.get("temperature")
        return 1.0 if parameter is None else float(parameter.default)

    def per_token(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | Coarse | None) -> Tensor:
        """The divergence of each labelled token: [rows]."""
        if isinstance(teacher_logits, Coarse):
            logits, teacher_logits = alike(logits, teacher_logits)
        return self.loss(logits, teacher_logits)


@dataclass(frozen=True, kw_only=True)
class Layerwise:
    """A term on hidden states: `loss(student, teacher, mask)` with one [batch, time, width] per layer pair.

    reduction `micro_batch`: the loss gives one value per layer; they are summed and averaged over the
    step's micro-batches (the paper's SquareHead; depends on how the step was cut). reduction `token`: the
    loss gives one value per attended token; they are summed and divided once by the step's attended tokens.
    `junction` is explained at `layer_pairs`.
    """

    loss: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Tensor]
    weight: NonNegative = 1.0
    junction: Literal["own", "span_end", "skip"] = "own"
    reduction: Literal["micro_batch", "token"] = "micro_batch"

    def value(self, student: Outputs, teacher: Outputs, mask: Tensor, cut: Cut, totals: Totals) -> Tensor:
        """This micro-batch's share of the step's value (a scalar)."""
        pairs = layer_pairs(cut, self.junction)
        values = self.loss([student.states[s] for s, _ in pairs], [teacher.states[t] for _, t in pairs], mask)
        divisor = totals.micro_batches if self.reduction == "micro_batch" else totals.attended
        return values.sum() / max(divisor, 1)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An arm: `data` names the answers (`reference`, `self`, `self_plain`), `terms` the weighted losses, and with
    `rollouts` the student writes answers of its own to some of the rows, or all.

    Without terms nothing is trained, so that answers need not be written. Raises UserError for self-data without
    terms, for terms that all weigh nothing, and for what does not go with rollouts: a term on labels, which would
    be the student's own samples; and where the teacher reads another prompt, terms on states, and rows whose
    answers are not the references that it is to be shown.
    """

    data: Literal["reference", "self", "self_plain"]
    terms: Mapping[str, Supervised | Distilled | Layerwise]
    rollouts: Rollouts | None = None

    def __post_init__(self) -> None:
        if not self.terms and self.data != "reference":
            raise UserError(f"a loss on data={self.data} has no terms: name at least one, or use loss=none")
        if self.terms and not any(term.weight for term in self.terms.values()):
            weights = ", ".join(f"loss.terms.{name}.weight=0" for name in self.terms)
            raise UserError(f"{weights}: nothing would be learned. Give a term a weight, or use loss=none.")
        if self.rollouts is not None:
            self._require_rollouts(self.rollouts)

    def _require_rollouts(self, rollouts: Rollouts) -> None:
        wrong = []
        if not self.terms:
            wrong.append("a loss with rollouts has no terms: name at least one, or use loss=none.")
        if labels := [name for name, term in self.terms.items() if isinstance(term, Supervised)]:
            wrong.append(
                f"loss.terms.{labels[0]} learns labels, and with loss.rollouts these are the student's own "
                f"samples. Leave it out (~loss.terms.{labels[0]}); rows that the student does not write "
                "(loss.rollouts.share) learn by the divergence too."
            )
        if rollouts.rewrite is not None and self.layer_terms:
            wrong.append(
                f"loss.terms.{next(iter(self.layer_terms))} compares states token by token, and with "
                "loss.rollouts.rewrite the teacher reads another prompt. Use loss=on_policy with it."
            )
        if rollouts.rewrite is not None and self.data != "reference":
            wrong.append(
                f"loss.rollouts.rewrite shows the teacher the row's reference, and with loss.data={self.data} rows "
                "carry other answers. Use loss.data=reference."
            )
        if wrong:
            raise UserError(*wrong)

    @property
    def token_terms(self) -> dict[str, Supervised | Distilled]:
        """The terms that give a value for each labelled token, by name."""
        return {name: term for name, term in self.terms.items() if not isinstance(term, Layerwise)}

    @property
    def layer_terms(self) -> dict[str, Layerwise]:
        """The terms on hidden states, by name."""
        return {name: term for name, term in self.terms.items() if isinstance(term, Layerwise)}

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at a teacher."""
        return any(not isinstance(term, Supervised) for term in self.terms.values())

    @property
    def temperature(self) -> float:
        """The temperature at which a teacher's distributions are compared, the same in all terms. Raises UserError
        where there are several."""
        at = {name: term.temperature for name, term in self.terms.items() if isinstance(term, Distilled)}
        if len({*at.values()}) > 1:
            settings = ", ".join(f"loss.terms.{name}.loss.temperature={value}" for name, value in at.items())
            raise UserError(
                f"{settings}: a teacher is captured at one temperature. Set the same for all, or leave out "
                "teacher_cache."
            )
        return next(iter(at.values()), 1.0)

    @property
    def needs_states(self) -> bool:
        """Whether any term looks at hidden states."""
        return bool(self.layer_terms)


def layer_pairs(cut: Cut, junction: str) -> list[tuple[int, int]]:
    """Which teacher block each student block is held to: [(student block, teacher block)], from 0.

    Student block j came from teacher block kept[j] and is held to its output. A block just before removed
    ones is held to that (`own`), to the output of the last removed block (`span_end`: what the following
    block was trained on), or to nothing (`skip`). A cut at the very start has no block before it.

    The last state of either model is after the final norm. So where the last blocks were removed, the
    student's last block has no comparable `own` state and is left out; `span_end` pairs it with the
    teacher's last block, both after the norm.
    """
    following = (*cut.kept[1:], cut.total)
    pairs = []
    for block, (own, after) in enumerate(zip(cut.kept, following, strict=True)):
        if own + 1 == after:
            pairs.append((block, own))
        elif junction == "span_end":
            pairs.append((block, after - 1))
        elif junction == "own" and after < cut.total:
            pairs.append((block, own))
    return pairs


def require_terms(objective: Objective) -> None:
    """Raises UserError where a term does not give what it is summed as, tried on a few random numbers: one finite
    value for each token of a token term, for each layer or attended token of a term on states."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    logits, teacher, labels = draw(ROWS, 7), draw(ROWS, 7), torch.arange(ROWS)
    states = [[draw(2, 3, 4) for _ in range(LAYERS)] for _ in range(2)]
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    wrong: list[str] = []
    for name, term in objective.terms.items():
        expected = {"micro_batch": LAYERS, "token": int(mask.sum())}[getattr(term, "reduction", "token")]
        where = f"loss.terms.{name}"
        try:
            if isinstance(term, Layerwise):
                value = tried(f"{where}.loss", term.loss, *states, mask)
            else:
                value, expected = tried(f"{where}.loss", term.per_token, logits, labels, teacher), ROWS
        except UserError as error:
            wrong += error.args
            continue
        wrong += _wrong_values(where, value, term.weight, expected)
    if wrong:
        raise UserError(*wrong)


def _wrong_values(where: str, value: Any, weight: float, expected: int) -> list[str]:
    if not isinstance(value, Tensor) or value.shape != (expected,):
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        return [
            f"{where}.loss gives {shape} where [{expected}] is summed: one value for each row of logits, or of "
            "states for each layer (reduction=micro_batch) or attended token (reduction=token)."
        ]
    if not (weight * value).isfinite().all():
        return [f"{where} is not finite on random numbers. Look at its weight and its loss's settings."]
    return []


def require_comparable(objective: Objective, student: Any, teacher: Any) -> None:
    """Raises UserError where the teacher (both are model configs) cannot serve this objective: no term asks for
    one, the vocabularies differ, or blocks would be held to blocks that do not match."""
    if not objective.needs_teacher:
        raise UserError(
            f"another teacher was given, but no term of the loss ({', '.join(objective.terms)}) uses a teacher. "
            f"Choose loss=kd or loss=squarehead, or leave teacher out."
        )
    check_vocabularies(student, teacher)
    shapes = [(config.num_hidden_layers, config.hidden_size) for config in (student, teacher)]
    if objective.needs_states and shapes[0] != shapes[1]:
        raise UserError(
            f"{', '.join(objective.layer_terms)} compares blocks one by one, but the model has (blocks, width) = "
            f"{shapes[0]} and the teacher {shapes[1]}. Use a teacher of the same shape, or loss=kd."
        )


def require_junction(objective: Objective, *, retrained: bool) -> None:
    """Raises UserError where a term would hold the student's block before a patched junction to a state that it
    does not stand for: its own teacher block's, unless it was `retrained` to stand for the removed ones too."""
    right = "span_end" if retrained else "own"
    for name, term in objective.layer_terms.items():
        if term.junction not in (right, "skip"):
            gives = "what the last removed block gave" if retrained else "its own output"
            raise UserError(
                f"loss.terms.{name}.junction={term.junction} does not go with this pruning.patch: the block before "
                f"the junction gives {gives}. Set loss.terms.{name}.junction={right}, or skip."
            )
