"""Fit patches: one pass of the unpruned model over calibration text, then training for those that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sddx.compression.junction import Gap, before_gap, gaps, known_feed_forward
from sddx.compression.patches import Fit, Patch
from sddx.errors import UserError
from sddx.models.anatomy import blocks, decoder, family, part
from sddx.models.outputs import block_states, branch_states, entering, first, with_state
from sddx.records import Batch, Cut
from sddx.runtime import Runtime

UNEXPLAINED = 8  # batches on which it is told what patches leave unexplained


def fit_patches(
    model: Any,
    cut: Cut,
    make: Callable[[], Fit],
    batches: Sequence[Batch],
    runtime: Runtime,
    block: Callable[[int], nn.Module] | None = None,
) -> tuple[dict[Gap, Any], dict[str, float]]:
    """A patch for every gap of the cut, float64 or (a retrained block) float32, and by the gap's name the share of
    the removed update's energy that it leaves unexplained on the calibration text.

    `model` is the whole unpruned model, frozen and in eval mode; `block(number)` gives a copy of one of its blocks
    where it cannot be copied itself. Raises UserError where a patch of this kind
    cannot stand in for what was removed, or has too few tokens.
    """
    fits = {gap: make() for gap in gaps(cut)}
    for gap, fit in fits.items():
        _require_possible(model, cut, gap, fit)
    total = sum(len(batch.input_ids) for batch in batches)
    with runtime.progress(total=total, what="fitting patches", unit="text") as bar, torch.no_grad():
        for batch in batches:
            for gap, seen in observe(model, fits, batch).items():
                fits[gap].see(seen.before, seen.after)
            bar.update(len(batch.input_ids))
    begin = block or (lambda number: deepcopy(blocks(model)[number]))
    solved = {gap: begin(gap.start - 1) if fit.reads == "preceding" else fit.solve() for gap, fit in fits.items()}
    for gap, fit in fits.items():
        if fit.epochs:
            solved[gap] = _imitate(model, gap, fit, solved[gap], batches, runtime)
    unexplained = _unexplained(model, fits, solved, batches)
    patches = {gap: patch if isinstance(patch, Patch) else patch.state_dict() for gap, patch in solved.items()}
    return patches, unexplained


def _require_possible(model: Any, cut: Cut, gap: Gap, fit: Fit) -> None:
    if fit.reads != "stream":
        before_gap(cut, gap)
    if fit.reads == "feedforward":
        written = known_feed_forward(decoder(model).config.model_type).written
        if part(blocks(model)[gap.start - 1], written) is None:
            raise UserError(
                f"the patch {fit.name!r} needs one linear layer at the end of the feed-forward branch, and block "
                f"{gap.start - 1} of a {type(model).__name__} has none ({written}). Use pruning/patch=linear."
            )


@dataclass(frozen=True)
class Seen:
    """What a batch showed at one gap: the patch's input and what it should give, of the attended tokens
    [tokens, width]; and how the block before the junction was called, where that is retrained."""

    before: Tensor
    after: Tensor
    call: tuple[tuple, dict[str, Any]] | None = None


def observe(model: Any, fits: Mapping[Gap, Fit], batch: Batch) -> dict[Gap, Seen]:
    """One pass of the unpruned model: what stood before and after every gap."""
    device = next(model.parameters()).device
    mask = batch.attention_mask.to(device)
    branched: Any = branch_states(model) if any(gap.kind != "blocks" for gap in fits) else nullcontext([])
    with block_states(model) as states, branched as pairs, _neighbours(model, fits) as (calls, written):
        decoder(model)(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
    kept, activations = mask.bool(), {}
    for gap, fit in fits.items():
        if gap.kind == "blocks":
            before, after = states[gap.start][kept], states[gap.end][kept]
        else:
            before, after = (state[kept] for state in pairs[2 * gap.start + (gap.kind == "feedforward")])
        if fit.reads == "feedforward":
            output = written[gap].reshape(*kept.shape, -1)[kept]
            before, after = output, output + (after - before)
        activations[gap] = Seen(before, after, calls.get(gap))
    return activations


@contextmanager
def _neighbours(model: Any, fits: Mapping[Gap, Fit]) -> Iterator[tuple[dict[Gap, tuple], dict[Gap, Tensor]]]:
    """By gap, how the block before it was called and what its feed-forward branch wrote, where a fit reads that."""
    calls: dict[Gap, tuple] = {}
    written: dict[Gap, Tensor] = {}

    def called(gap: Gap, block: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        calls[gap] = arguments, named

    def wrote(gap: Gap, module: nn.Module, arguments: tuple, output: Tensor) -> None:
        written[gap] = output

    handles = []
    for gap, fit in fits.items():
        if fit.reads != "stream":
            block = blocks(model)[gap.start - 1]
        if fit.reads == "preceding":
            handles.append(block.register_forward_pre_hook(partial(called, gap), with_kwargs=True))
        elif fit.reads == "feedforward":
            handles.append(part(block, family(model).written).register_forward_hook(partial(wrote, gap)))
    try:
        yield calls, written
    finally:
        for handle in handles:
            handle.remove()


def _predicted(patch: Any, seen: Seen, kept: Tensor) -> Tensor:
    """What the patch makes of what it is given."""
    if seen.call is None:
        return patch(seen.before.float())
    arguments, named = with_state(entering(*seen.call).float(), *seen.call)
    return first(patch(*arguments, **named))[kept]


def _imitate(model: Any, gap: Gap, fit: Any, patch: Any, batches: Sequence[Batch], runtime: Runtime) -> Any:
    """Train a patch to give what the removed part gave, by mean squared error over attended tokens."""
    patch = patch.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(patch.parameters(), lr=fit.learning_rate, weight_decay=0.0)
    with runtime.progress(total=fit.epochs * len(batches), what=f"training {gap.name}", unit="step") as bar:
        for _ in range(fit.epochs):
            for batch in batches:
                with torch.no_grad():
                    seen = observe(model, {gap: fit}, batch)[gap]
                kept = batch.attention_mask.bool().to(seen.before.device)
                with torch.enable_grad():
                    error = (_predicted(patch, seen, kept).float() - seen.after.float()).square().mean()
                    error.backward()
                optimizer.step()
                optimizer.zero_grad()
                bar.set_postfix_str(f"error {error.item():.3g}", refresh=False)
                bar.update(1)
    return patch.requires_grad_(False)


@torch.no_grad()
def _unexplained(
    model: Any, fits: Mapping[Gap, Fit], solved: Mapping[Gap, Any], batches: Sequence[Batch]
) -> dict[str, float]:
    """Squared error of the patches over the energy of the removed updates, on the first batches."""
    left = {gap: [0.0, 0.0] for gap in solved}
    for batch in batches[:UNEXPLAINED]:
        kept = batch.attention_mask.bool().to(next(model.parameters()).device)
        for gap, seen in observe(model, fits, batch).items():
            left[gap][0] += float(
                (_predicted(solved[gap], seen, kept).double() - seen.after.double()).square().sum()
            )
            left[gap][1] += float((seen.before.double() - seen.after.double()).square().sum())
    return {gap.name: error / energy if energy else 0.0 for gap, (error, energy) in left.items()}
