"""What a student is trained to lower: pure functions that give one value per row, unreduced.

Token losses take logits of labelled positions, [rows, vocabulary], and give [rows]; whoever calls them
sums and divides once by the labelled tokens of the optimiser step. Everything is computed in float32, or
in float64 where the input is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sddx.records import NonNegative, Share


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label), in nats: logits [rows, vocabulary] and labels [rows] to [rows]."""
    return functional.cross_entropy(exact(logits), labels, reduction="none")


def kl_teacher_student(student: Tensor, teacher: Tensor, *, temperature: NonNegative = 1.0) -> Tensor:
    """Forward KL(teacher || student) * T^2 of the logits [rows, vocabulary], in nats, to [rows].

    Both distributions are softened by T; T^2 keeps the size of the gradient (Hinton et al., 1503.02531).
    """
    return _ForwardKL.apply(_softened(student, temperature), _softened(teacher, temperature)) * temperature**2


def kl_student_teacher(student: Tensor, teacher: Tensor, *, temperature: NonNegative = 1.0) -> Tensor:
    """Reverse KL(student || teacher) * T^2 of the logits [rows, vocabulary], in nats, to [rows]."""
    return _kl(_log_softmax(student, temperature), _log_softmax(teacher, temperature)) * temperature**2


def jsd_beta(student: Tensor, teacher: Tensor, *, beta: Share = 0.5, temperature: NonNegative = 1.0) -> Tensor:
    """Generalised Jensen-Shannon divergence * T^2 of the logits [rows, vocabulary], in nats, to [rows].

    beta * KL(teacher || m) + (1 - beta) * KL(student || m) with m = beta * teacher + (1 - beta) * student
    (GKD, 2306.13649, eq. 1). The formula is 0 at both ends, so by convention beta = 0 means the forward KL
    and beta = 1 the reverse KL, which are the limits of jsd / beta and of jsd / (1 - beta). The value
    therefore jumps at the ends. Raises ValueError for beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], not {beta}")
    if beta == 0:
        return kl_teacher_student(student, teacher, temperature=temperature)
    if beta == 1:
        return kl_student_teacher(student, teacher, temperature=temperature)
    log_student, log_teacher = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    log_mixture = torch.logaddexp(log_teacher + math.log(beta), log_student + math.log1p(-beta))
    divergence = beta * _kl(log_teacher, log_mixture) + (1 - beta) * _kl(log_student, log_mixture)
    return divergence * temperature**2


def squarehead(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, *, epsilon: float = 2**-7
) -> Tensor:
    """SquareHead in its paper form, a ratio per layer: mean((S - T)^2) / (mean(T^2) + epsilon), to [layers].

    States are [batch, time, width] per layer; the means run over the channels of all attended tokens (mask
    [batch, time] not 0), prompt included. The caller sums over layers. 0 where nothing is attended.
    Kurtic et al., 2310.06927; epsilon is bfloat16's machine epsilon, as in the authors' code.
    """
    tokens = _attended(mask)
    return torch.stack([_ratio(s, t, tokens, epsilon) for s, t in zip(student, teacher, strict=True)])


def squarehead_token(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, *, epsilon: float = 2**-7
) -> Tensor:
    """SquareHead with a ratio per token, summed over layers: [attended tokens].

    For each attended token, the sum over layers of mean((S - T)^2) / (mean(T^2) + epsilon) with means over
    channels. Unlike the paper's form it is a sum over tokens, so it can be accumulated exactly.
    """
    tokens = _attended(mask)
    ratios = []
    for student_layer, teacher_layer in zip(student, teacher, strict=True):
        error, power = _squares(student_layer, teacher_layer, tokens)
        ratios.append(error.mean(-1) / (power.mean(-1) + epsilon))
    return torch.stack(ratios).sum(0)


def _ratio(student: Tensor, teacher: Tensor, tokens: Tensor, epsilon: float) -> Tensor:
    error, power = _squares(student, teacher, tokens)
    count = max(error.numel(), 1)
    return (error.sum() / count) / (power.sum() / count + epsilon)


def _squares(student: Tensor, teacher: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(S - T)^2 and T^2 of the chosen tokens, [tokens, width] each."""
    student, teacher = (exact(states.flatten(0, 1)[tokens]) for states in (student, teacher))
    return (student - teacher).square(), teacher.square()


def _attended(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().squeeze(1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class _ForwardKL(torch.autograd.Function):
    """KL(teacher || student) of softened logits [rows, vocabulary] to [rows]. Its derivative, the difference of the
    two distributions, spares autograd half of its tensors as large as the logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        probability = log_teacher.exp()
        ctx.save_for_backward(log_student, probability)
        return torch.linalg.vecdot(probability, log_teacher.sub_(log_student))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        log_student, probability = ctx.saved_tensors
        return log_student.exp().sub_(probability).mul_(gradient.unsqueeze(-1)), None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return functional.log_softmax(_softened(logits, temperature), dim=-1)


def _softened(logits: Tensor, temperature: float) -> Tensor:
    return exact(logits) if temperature == 1 else exact(logits) / temperature


def exact(values: Tensor) -> Tensor:
    """The values in the precision that losses are computed in: float32, or float64 as they came."""
    return values if values.dtype == torch.float64 else values.float()
