"""What stands in for removed parts: modules that predict their update, and how each is fitted.

A fit `see`s the residual stream before and after the removed part, [tokens, width], batch by batch, keeps sums
in float64 and `solve`s for the module. Sources: docs/sources.md.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sddx.errors import UserError
from sddx.records import Count, Natural, NonNegative, Positive

Reads = Literal["stream", "feedforward", "preceding"]


class Patch(nn.Module):
    """Adds `update(x)` to the residual stream, in the place of what was removed. Computes in its own precision
    or that of the stream, whichever is higher."""

    def __init__(self, **weights: Tensor) -> None:
        super().__init__()
        for name, weight in weights.items():
            setattr(self, name, nn.Parameter(weight, requires_grad=False))

    def update(self, x: Tensor) -> Tensor:
        """What is added to the stream: [..., width], in its dtype."""
        raise TypeError(f"{type(self).__name__} gives no update")

    def forward(self, x: Tensor) -> Tensor:
        """The stream with the update: [..., width]."""
        return x + self.update(x)

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, next(self.parameters()).dtype))


class Shift(Patch):
    """A constant update: `bias` [width]."""

    bias: Tensor

    def update(self, x: Tensor) -> Tensor:
        """The bias at every token."""
        return self.bias.to(x.dtype).expand_as(x)


class Scale(Patch):
    """Every channel times its factor: `factors` [width]."""

    factors: Tensor

    def update(self, x: Tensor) -> Tensor:
        """x times (factors - 1), so that the stream comes out as x times the factors."""
        return (self._wide(x) * (self.factors - 1)).to(x.dtype)


class Map(Patch):
    """A linear update x M: `matrix` M [width, width]."""

    matrix: Tensor

    def update(self, x: Tensor) -> Tensor:
        """x M, computed in the precision of M."""
        return (self._wide(x) @ self.matrix).to(x.dtype)


class LowRankMap(Patch):
    """A linear update of low rank, x A B: `down` A [width, rank] and `up` B [rank, width]."""

    down: Tensor
    up: Tensor

    def update(self, x: Tensor) -> Tensor:
        """x A B, computed in the precision of A."""
        return (self._wide(x) @ self.down @ self.up).to(x.dtype)


class FeedForwardMap(Patch):
    """Turns what the feed-forward branch before the junction adds, f, into f T: `matrix` T [width, width]."""

    matrix: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """f T, in the place of f: [..., width]."""
        return (self._wide(x) @ self.matrix).to(x.dtype)


class Fit:
    """What is common to all fits. `reads` names what the patch is given: the residual `stream`, what the
    `feedforward` branch before the junction adds to it, or the input of the `preceding` block. `foldable`: the
    patch can become part of weights that are there."""

    name = ""
    reads: Reads = "stream"
    foldable = False
    epochs = 0
    chunk = 4096  # tokens that are held in float64 at once

    def __init__(self) -> None:
        self.tokens = 0

    def see(self, before: Tensor, after: Tensor) -> None:
        """Take in tokens: [tokens, width] before and after, on any device."""
        for x, y in zip(before.split(self.chunk), after.split(self.chunk), strict=True):
            self.take(x.double(), y.double())
            self.tokens += len(x)

    def take(self, before: Tensor, after: Tensor) -> None:
        """Add some tokens, in float64, to the sums."""

    def solve(self) -> Patch:
        """The fitted module, in float64. Raises UserError where too few tokens were seen."""
        raise TypeError(f"{type(self).__name__} solves nothing")

    def _require(self, needed: int) -> None:
        if self.tokens < needed:
            raise UserError(
                f"the patch {self.name!r} was given {self.tokens} calibration tokens and needs {needed} at least "
                "(the width of the model, for a regression). Give more or longer calibration texts, or use "
                "pruning/patch=mean."
            )


class Mean(Fit):
    """The emulated update (arXiv 2407.16286): the mean update that the removed part made."""

    name, foldable = "mean", True

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(())

    def take(self, before: Tensor, after: Tensor) -> None:
        """Add the tokens' updates to their sum."""
        self.total = self.total + (after - before).sum(0)

    def solve(self) -> Shift:
        """A shift by the mean update. Raises UserError where no token was seen."""
        self._require(1)
        return Shift(bias=self.total / self.tokens)


class Diagonal(Fit):
    """Every channel times the ratio of its mean magnitudes after and before (the scaling of LinearPatch, arXiv
    2505.24680, without its rotation). A channel that is always 0 keeps its scale."""

    name = "diagonal"

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = torch.zeros(()), torch.zeros(())

    def take(self, before: Tensor, after: Tensor) -> None:
        """Add the tokens' magnitudes, channel by channel, to both sums."""
        self.before, self.after = self.before + before.abs().sum(0), self.after + after.abs().sum(0)

    def solve(self) -> Scale:
        """A scale of every channel. Raises UserError where no token was seen."""
        self._require(1)
        ratio = self.after / self.before
        return Scale(factors=torch.where(self.before > 0, ratio, torch.ones_like(ratio)))


class Linear(Fit):
    """Ridge regression of the update D on the stream X: M = (X'X + e I)^-1 X'D (Ghosted Layers, arXiv
    2605.15491), with e = `ridge` times the mean of X'X's diagonal, so that it means the same at any scale.

    Memory is a few [width, width] matrices in float64, whatever the number of tokens.
    """

    name = "linear"

    def __init__(self, *, ridge: NonNegative = 1e-6) -> None:
        super().__init__()
        if not ridge > 0:
            raise UserError(f"pruning.patch.fit.ridge must be above 0, not {ridge}: states can lie in a subspace.")
        self.ridge = ridge
        self.moments: tuple[Tensor, Tensor] | None = None

    def take(self, before: Tensor, after: Tensor) -> None:
        """Add the tokens to X'X and X'D."""
        if self.moments is None:
            square = before.new_zeros(before.shape[1], before.shape[1])
            self.moments = square, square.clone()
        self.moments[0].addmm_(before.T, before)
        self.moments[1].addmm_(before.T, after - before)

    def solve(self) -> Patch:
        """The regression as a map. Raises UserError for fewer tokens than channels."""
        return Map(matrix=self._regression())

    def _regression(self) -> Tensor:
        """Raises UserError for fewer tokens than channels, and where `ridge` is too small to tell directions that
        the states have no part in."""
        self._require(1)
        assert self.moments is not None
        square, cross = self.moments
        self._require(len(square))
        # In place: at a width of 4,096 each copy is 128 MiB.
        strength = self.ridge * square.diagonal().mean()
        square.diagonal().add_(strength)
        try:
            factor = torch.linalg.cholesky(square)
        except torch.linalg.LinAlgError as error:
            raise UserError(
                f"the patch {self.name!r} cannot be solved for: to rounding, the calibration states have no part "
                f"in some directions, or some are not finite. Raise pruning.patch.fit.ridge={self.ridge}, give "
                "other texts, or use pruning/patch=mean."
            ) from error
        square.diagonal().sub_(strength)
        return torch.cholesky_solve(cross, factor)


class LowRank(Linear):
    """The best linear update of rank `rank` (reduced-rank regression), then, with `epochs` above 0, trained to
    imitate the removed part (layer stitching, arXiv 2407.16286; its rank and training are not known)."""

    name = "low_rank"

    def __init__(
        self, *, rank: Count, ridge: NonNegative = 1e-6, epochs: Natural = 0, learning_rate: Positive = 1e-3
    ) -> None:
        super().__init__(ridge=ridge)
        if rank < 1:
            raise UserError(f"pruning.patch.fit.rank must be at least 1, not {rank}.")
        self.rank, self.epochs, self.learning_rate = rank, epochs, learning_rate

    def solve(self) -> Patch:
        """The regression's projection on its strongest directions. Raises UserError for fewer tokens than
        channels."""
        whole = self._regression()
        assert self.moments is not None
        # The directions in which the fitted updates vary most; their projection is the best fit of this rank.
        fitted = whole.T @ self.moments[0] @ whole
        top = torch.linalg.eigh(fitted).eigenvectors[:, -self.rank :]
        return LowRankMap(down=whole @ top, up=top.T.contiguous())


class LinearFeedForward(Linear):
    """Least squares on what the feed-forward branch before the junction adds, f to f T (ReplaceMe, arXiv
    2505.02819): can be folded into that branch's last linear layer."""

    name, foldable = "linear_ffn", True
    reads: Reads = "feedforward"

    def solve(self) -> Patch:
        """The regression and the identity, so that T maps the branch's output to what it stands for."""
        update = self._regression()
        return FeedForwardMap(matrix=update + torch.eye(len(update), dtype=update.dtype, device=update.device))


class LightBlock(Fit):
    """The block before the junction, retrained to imitate itself and the removed blocks by mean squared error
    (LLM-Streamline, arXiv 2403.19135, which replaces a span of n + 1 blocks by one that begins as its first).
    There is nothing to solve: training begins at that block."""

    name = "block"
    reads: Reads = "preceding"

    def __init__(self, *, epochs: Natural = 1, learning_rate: Positive = 2e-4) -> None:
        super().__init__()
        if epochs < 1:
            raise UserError(
                f"pruning.patch.fit.epochs must be at least 1, not {epochs}: this patch is only trained."
            )
        self.epochs, self.learning_rate = epochs, learning_rate
