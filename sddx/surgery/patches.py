"""What stands in for removed parts: modules that predict their update, and how each is fitted.

A fit `see`s the residual stream before and after the removed part, [tokens, width], batch by batch, keeps sums
in float64 and `solve`s for the module. Sources: facts.md B5 (mean, low rank) and D2 (the others).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sddx.records import UserError

Reads = Literal["stream", "feedforward", "preceding"]


class Patch(nn.Module):
    """Adds `update(x)` to the residual stream, in the place of what was removed. Computes in its own precision
    or that of the stream, whichever is higher."""

    def __init__(self, **weights: Tensor) -> None:
        super().__init__()
        for name, weight in weights.items():
            setattr(self, name, nn.Parameter(weight, requires_grad=False))

    def update(self, x: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} gives no update")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.update(x)

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, next(self.parameters()).dtype))


class Shift(Patch):
    """A constant update: `bias` [width]."""

    bias: Tensor

    def update(self, x: Tensor) -> Tensor:
        return self.bias.to(x.dtype).expand_as(x)


class Scale(Patch):
    """Every channel times its factor: `factors` [width]."""

    factors: Tensor

    def update(self, x: Tensor) -> Tensor:
        return (self._wide(x) * (self.factors - 1)).to(x.dtype)


class Map(Patch):
    """A linear update x M: `matrix` M [width, width]."""

    matrix: Tensor

    def update(self, x: Tensor) -> Tensor:
        return (self._wide(x) @ self.matrix).to(x.dtype)


class LowRankMap(Patch):
    """A linear update of low rank, x A B: `down` A [width, rank] and `up` B [rank, width]."""

    down: Tensor
    up: Tensor

    def update(self, x: Tensor) -> Tensor:
        return (self._wide(x) @ self.down @ self.up).to(x.dtype)


class FeedForwardMap(Patch):
    """Turns the output f of the feed-forward branch before the junction into f T: `matrix` T [width, width]."""

    matrix: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return (self._wide(x) @ self.matrix).to(x.dtype)


class Fit:
    """What is common to all fits. `reads` names what the patch is given: the residual `stream`, the output of
    the `feedforward` branch before the junction, or the input of the `preceding` block."""

    reads: Reads = "stream"
    foldable = False
    epochs = 0

    def see(self, before: Tensor, after: Tensor) -> None:
        """Take in tokens: [tokens, width] before and after, on any device."""

    def solve(self) -> Any:
        """The fitted module, in float64. Raises UserError where too few tokens were seen."""


class Mean(Fit):
    """The emulated update (arXiv 2407.16286): the mean update that the removed part made."""

    foldable = True

    def __init__(self) -> None:
        self.tokens, self.total = 0, torch.zeros(())

    def see(self, before: Tensor, after: Tensor) -> None:
        self.tokens += len(before)
        self.total = self.total + (after.double() - before.double()).sum(0)

    def solve(self) -> Shift:
        _require_tokens("mean", self.tokens, 1)
        return Shift(bias=self.total / self.tokens)


class Diagonal(Fit):
    """Every channel times the ratio of its mean magnitudes after and before (the scaling of LinearPatch, arXiv
    2505.24680, without its rotation). A channel that is always 0 keeps its scale."""

    def __init__(self) -> None:
        self.tokens, self.before, self.after = 0, torch.zeros(()), torch.zeros(())

    def see(self, before: Tensor, after: Tensor) -> None:
        self.tokens += len(before)
        self.before = self.before + before.double().abs().sum(0)
        self.after = self.after + after.double().abs().sum(0)

    def solve(self) -> Scale:
        _require_tokens("diagonal", self.tokens, 1)
        ratio = self.after / self.before
        return Scale(factors=torch.where(self.before > 0, ratio, torch.ones_like(ratio)))


class Linear(Fit):
    """Ridge regression of the update D on the stream X: M = (X'X + e I)^-1 X'D (Ghosted Layers, arXiv
    2605.15491), with e = `ridge` times the mean of X'X's diagonal, so that it means the same at any scale.

    Memory is a few [width, width] matrices in float64, whatever the number of tokens.
    """

    chunk = 4096  # tokens that are held in float64 at once

    def __init__(self, *, ridge: float = 1e-6) -> None:
        self.ridge, self.tokens = ridge, 0
        self.moments: tuple[Tensor, Tensor] | None = None

    def see(self, before: Tensor, after: Tensor) -> None:
        for x, y in zip(before.split(self.chunk), after.split(self.chunk), strict=True):
            x = x.double()
            update = y.double() - x
            if self.moments is None:
                square = x.new_zeros(x.shape[1], x.shape[1])
                self.moments = square, square.clone()
            self.moments[0].addmm_(x.T, x)
            self.moments[1].addmm_(x.T, update)
            self.tokens += len(x)

    def solve(self) -> Any:
        return Map(matrix=self._regression())

    def _regression(self) -> Tensor:
        name = type(self).__name__.lower()
        _require_tokens(name, self.tokens, 1)
        assert self.moments is not None
        square, cross = self.moments
        _require_tokens(name, self.tokens, len(square))
        # In place: at a width of 4,096 each copy is 128 MiB.
        strength = self.ridge * square.diagonal().mean()
        square.diagonal().add_(strength)
        factor = torch.linalg.cholesky(square)
        square.diagonal().sub_(strength)
        return torch.cholesky_solve(cross, factor)


class LowRank(Linear):
    """The best linear update of rank `rank` (reduced-rank regression), then, with `epochs` above 0, trained to
    imitate the removed part (layer stitching, arXiv 2407.16286; its rank and training are not known)."""

    def __init__(self, *, rank: int, ridge: float = 1e-6, epochs: int = 0, learning_rate: float = 1e-3) -> None:
        super().__init__(ridge=ridge)
        if rank < 1:
            raise UserError(f"pruning.patch.fit.rank must be at least 1, not {rank}.")
        self.rank, self.epochs, self.learning_rate = rank, epochs, learning_rate

    def solve(self) -> LowRankMap:
        whole = self._regression()
        assert self.moments is not None
        # The directions in which the fitted updates vary most; their projection is the best fit of this rank.
        fitted = whole.T @ self.moments[0] @ whole
        top = torch.linalg.eigh(fitted).eigenvectors[:, -self.rank :]
        return LowRankMap(down=whole @ top, up=top.T.contiguous())


class LinearFeedForward(Linear):
    """Least squares on the output f of the feed-forward branch before the junction, f T (ReplaceMe, arXiv
    2505.02819): can be folded into that branch's last linear layer."""

    reads: Reads = "feedforward"
    foldable = True

    def solve(self) -> FeedForwardMap:
        update = self._regression()
        return FeedForwardMap(matrix=update + torch.eye(len(update), dtype=update.dtype, device=update.device))


class LightBlock(Fit):
    """The block before the junction, retrained to imitate itself and the removed blocks by mean squared error
    (LLM-Streamline, arXiv 2403.19135, which replaces a span of n + 1 blocks by one that begins as its first)."""

    reads: Reads = "preceding"

    def __init__(self, *, epochs: int = 1, learning_rate: float = 2e-4) -> None:
        if epochs < 1:
            raise UserError(
                f"pruning.patch.fit.epochs must be at least 1, not {epochs}: this patch is only trained."
            )
        self.epochs, self.learning_rate = epochs, learning_rate


def _require_tokens(name: str, seen: int, needed: int) -> None:
    if seen < needed:
        raise UserError(
            f"the patch {name!r} was given {seen} calibration tokens and needs {needed} at least (the width of the "
            "model, for a regression). Give more or longer calibration texts, or use pruning/patch=mean."
        )
