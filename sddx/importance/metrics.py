"""How much parts of a model change the hidden state. Pure functions of states and mask.

`states` are [batch, time, width] each: the residual stream before every unit, then after the last one, before
the final norm. `mask` [batch, time] is 1 for tokens and 0 for padding, on whichever side. Each metric returns
one value per sequence and unit (a matrix for distances), in float32 at least. A sequence without tokens gives
NaN. Low values mean that a unit matters little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sddx.errors import UserError

# Below this squared chord, float32 cosines are too coarse and the difference itself is taken.
NEAR = 1e-2
CHUNK = 256  # tokens whose directions are held at once: few enough for a CPU's cache


def angular_distance(states: Sequence[Tensor], mask: Tensor, *, tokens: Literal["last", "all"] = "last") -> Tensor:
    """The angle between the states before and after every run of units, over pi: [batch, L + 1, L + 1].

    Entry [i, j] is arccos(cosine of state i and state j) / pi, in [0, 1]: what removing units i to j - 1
    would skip (Gromov et al., arXiv 2403.17887). Taken at the last token of the sequence, or
    averaged over all its tokens.
    """
    if tokens not in ("last", "all"):
        raise UserError(f"pruning.metric.tokens is 'last' or 'all', not {tokens!r}.")
    kept = mask.bool() if tokens == "all" else _last_token(mask)
    angles = []
    for rows, times in zip(*(place.split(CHUNK) for place in kept.nonzero(as_tuple=True)), strict=True):
        vectors = torch.stack([_wide(state[rows, times]) for state in states], dim=1)
        angles.append(_angles(_directions(vectors)))
    if not angles:
        return states[0].new_full((len(mask), len(states), len(states)), torch.nan)
    return _sequence_means(torch.cat(angles), kept)


def _last_token(mask: Tensor) -> Tensor:
    """True at the last token of every sequence: [batch, time]."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask.bool()
    return (places == places.max(1, keepdim=True).values) & mask.bool()


def _angles(unit: Tensor) -> Tensor:
    """Angles over pi between all of a token's directions: [tokens, states, width] -> [tokens, states, states].

    On the unit sphere the chord is 2 sin(angle / 2). Unlike arccos it keeps small angles: the squared chord of
    far directions comes from one matrix product, that of near ones from their difference, exactly 0 for equal
    states.
    """
    square = 2 - 2 * (unit @ unit.transpose(1, 2))
    token, first, second = (square < NEAR).triu(1).nonzero(as_tuple=True)
    for part in torch.arange(len(token), device=unit.device).split(2**16):
        t, i, j = token[part], first[part], second[part]
        exact = (unit[t, i] - unit[t, j]).square().sum(-1)
        square[t, i, j] = square[t, j, i] = exact
    square.diagonal(dim1=1, dim2=2).zero_()
    return torch.asin((square.clamp(min=0).sqrt() / 2).clamp(max=1)) * (2 / torch.pi)


def block_influence(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """1 - cosine of each unit's input and output, averaged over the tokens of a sequence: [batch, L].

    ShortGPT's BI (arXiv 2403.03853).
    """

    kept = mask.bool()
    before, values = _directions(_kept(states[0], kept)), []
    for state in states[1:]:
        after = _directions(_kept(state, kept))
        # For unit vectors 1 - cosine is half the squared chord, exactly 0 for equal states.
        values.append((after - before).square().sum(-1) / 2)
        before = after
    return _sequence_means(torch.stack(values, dim=1), kept)


def update_norm(
    states: Sequence[Tensor], mask: Tensor, *, order: Literal[1, 2] = 2, relative: bool = True
) -> Tensor:
    """The L1 or L2 norm of each unit's update, `relative` to that of its input or as it is, averaged over the
    tokens of a sequence: [batch, L]. The code of arXiv 2407.16286 names these norms without computing them, so
    that the formula is inferred. A zero input has ratio 0 to a zero update, and infinity to any other.
    """
    if order not in (1, 2):
        raise UserError(f"pruning.metric.order is 1 or 2, not {order!r}.")

    def norm(before: Tensor, after: Tensor) -> Tensor:
        update = torch.linalg.vector_norm(after - before, ord=order, dim=-1)
        if not relative:
            return update
        return torch.where(update == 0, update, update / torch.linalg.vector_norm(before, ord=order, dim=-1))

    return _over_units(states, mask, norm)


def norm_ratio(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """|log(norm after / norm before)| of each unit, averaged over the tokens of a sequence: [batch, L]. 0 where a
    unit keeps the length of the hidden state, whichever way it turns it."""

    def ratio(before: Tensor, after: Tensor) -> Tensor:
        lengths = [torch.linalg.vector_norm(state, dim=-1) for state in (before, after)]
        return torch.where(lengths[0] == lengths[1], 0.0, (lengths[1].log() - lengths[0].log()).abs())

    return _over_units(states, mask, ratio)


def _over_units(states: Sequence[Tensor], mask: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`measure(before, after)` of every unit, each [tokens, width] -> [tokens], averaged over a sequence's
    tokens: [batch, L]."""
    kept = mask.bool()
    before, values = _kept(states[0], kept), []
    for state in states[1:]:
        after = _kept(state, kept)
        values.append(measure(before, after))
        before = after
    return _sequence_means(torch.stack(values, dim=1), kept)


def _kept(state: Tensor, kept: Tensor) -> Tensor:
    """The states of the tokens that count, in float32 at least: [tokens, width]."""
    return _wide(state[kept])


def _wide(vectors: Tensor) -> Tensor:
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def _sequence_means(values: Tensor, kept: Tensor) -> Tensor:
    """Means over each sequence's tokens: [tokens, ...] in the order of `kept` [batch, time] -> [batch, ...]."""
    counts = kept.sum(1)
    owner = torch.repeat_interleave(torch.arange(len(kept), device=kept.device), counts)
    sums = values.new_zeros(len(kept), *values.shape[1:]).index_add_(0, owner, values)
    return sums / counts.to(values.dtype).view(-1, *[1] * (values.dim() - 1))


def _directions(vectors: Tensor) -> Tensor:
    """Vectors on the unit sphere, with one coordinate more: [..., width] -> [..., width + 1].

    A zero vector has no direction. The added coordinate, 1 for zero vectors and 0 otherwise, makes it
    orthogonal to everything else (cosine 0) and equal to another zero vector.
    """
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    zero = (norm == 0).to(norm.dtype)
    return torch.cat([vectors / (norm + zero), zero], dim=-1)
