"""How much blocks change the hidden state. Pure functions of states and mask.

`states` are [batch, time, width] each: the input of every block, then the output of the last one, before the
final norm. `mask` [batch, time] is 1 for tokens and 0 for padding, on whichever side. Each metric returns one
value (vector, matrix) per sequence. A sequence without tokens gives NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch


def angular_distance(
    states: Sequence[torch.Tensor], mask: torch.Tensor, *, tokens: Literal["last", "all"] = "last"
) -> torch.Tensor:
    """The angle between the states before and after every run of blocks, over pi: [batch, L + 1, L + 1].

    Entry [i, j] is arccos(cosine of state i and state j) / pi, in [0, 1]: what removing blocks i to j - 1
    would skip (Gromov et al., arXiv 2403.17887; facts A4). Taken at the last token of the sequence, or
    averaged over all its tokens. In float32 at least.
    """
    if tokens not in ("last", "all"):
        raise ValueError(f"tokens is 'last' or 'all', not {tokens!r}")
    matrices = []
    for sequence in range(len(mask)):
        unit = _directions(states, mask, sequence)
        unit = unit[-1:] if tokens == "last" else unit
        # On the unit sphere the chord is 2 sin(angle / 2). Unlike arccos it keeps small angles exact: 0 for
        # equal states. Hence also no matrix product, which would take the chord from rounded cosines.
        chord = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
        matrices.append((torch.asin((chord / 2).clamp(max=1)) * (2 / torch.pi)).mean(0))
    return torch.stack(matrices)


def block_influence(states: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """1 - cosine of each block's input and output, averaged over the tokens of a sequence: [batch, L].

    ShortGPT's BI (arXiv 2403.03853; facts B1), in float32 at least.
    """
    rows = []
    for sequence in range(len(mask)):
        unit = _directions(states, mask, sequence)
        # For unit vectors 1 - cosine is half the squared chord, exactly 0 for equal states.
        rows.append(unit.diff(dim=1).square().sum(-1).mean(0) / 2)
    return torch.stack(rows)


def _directions(states: Sequence[torch.Tensor], mask: torch.Tensor, sequence: int) -> torch.Tensor:
    """The states of one sequence's tokens on the unit sphere: [tokens, L + 1, width + 1].

    A zero vector has no direction. The added coordinate, 1 for zero vectors and 0 otherwise, makes it
    orthogonal to everything else (cosine 0) and equal to another zero vector.
    """
    kept = mask[sequence].bool()
    vectors = torch.stack([state[sequence, kept] for state in states], dim=1)
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    zero = (norm == 0).to(norm.dtype)
    return torch.cat([vectors / (norm + zero), zero], dim=-1)
