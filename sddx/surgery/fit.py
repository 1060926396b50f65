"""Fit patches: one pass of the unpruned model over calibration text, then training for those that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sddx.models.anatomy import blocks, decoder, family, part
from sddx.models.outputs import block_states, branch_states, first
from sddx.records import Batch, Cut, UserError
from sddx.runtime import Runtime
from sddx.surgery.junction import Gap, before_gap, gaps
from sddx.surgery.patches import Fit, Patch


def fit_patches(
    model: Any, cut: Cut, make: Callable[[], Fit], batches: Sequence[Batch], runtime: Runtime
) -> tuple[dict[Gap, Any], dict[str, float]]:
    """A patch for every gap of the cut, float64 or (a retrained block) float32, and by the gap's name the share of
    the removed update's energy that it leaves unexplained on the calibration text.

    `model` is the whole unpruned model, frozen and in eval mode. Raises UserError where a patch of this kind
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
    solved = {gap: _begin(model, gap) if fit.reads == "preceding" else fit.solve() for gap, fit in fits.items()}
    for gap, fit in fits.items():
        if fit.epochs:
            solved[gap] = _imitate(model, gap, fit, solved[gap], batches, runtime)
    unexplained = _unexplained(model, fits, solved, batches)
    return {
        gap: patch if isinstance(patch, Patch) else patch.state_dict() for gap, patch in solved.items()
    }, unexplained


def _require_possible(model: Any, cut: Cut, gap: Gap, fit: Fit) -> None:
    if fit.reads != "stream":
        before_gap(cut, gap)
        if fit.reads == "feedforward" and part(blocks(model)[gap.start - 1], family(model).written) is None:
            raise UserError(
                f"the patch {fit.name!r} needs one linear layer at the end of the feed-forward branch, and block "
                f"{gap.start - 1} of a {type(model).__name__} has none ({family(model).written}). Use "
                "pruning/patch=linear."
            )


@dataclass(frozen=True)
class Seen:
    """What a batch showed at one gap: the patch's input and what it should give, of the attended tokens
    [tokens, width]; and how the block before the junction was called, where that is retrained."""

    before: Tensor
    after: Tensor
    call: tuple[Tensor, tuple, dict[str, Any]] | None = None


def observe(model: Any, fits: Mapping[Gap, Fit], batch: Batch) -> dict[Gap, Seen]:
    """One pass of the unpruned model: what stood before and after every gap."""
    device = next(model.parameters()).device
    mask = batch.attention_mask.to(device)
    kept = mask.bool()
    calls: dict[int, tuple] = {}
    outputs: dict[int, Tensor] = {}
    handles = []
    for gap, fit in fits.items():
        if fit.reads == "preceding":
            block = blocks(model)[gap.start - 1]
            handles.append(block.register_forward_pre_hook(_noting(calls, gap.start - 1), with_kwargs=True))
        if fit.reads == "feedforward":
            written = part(blocks(model)[gap.start - 1], family(model).written)
            handles.append(written.register_forward_hook(_keeping(outputs, gap.start - 1)))
    watched: Any = branch_states(model) if any(gap.kind != "blocks" for gap in fits) else nullcontext([])
    try:
        with block_states(model) as states, watched as pairs:
            decoder(model)(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for gap, fit in fits.items():
        if gap.kind == "blocks":
            before, after = states[gap.start][kept], states[gap.end][kept]
        else:
            before, after = (state[kept] for state in pairs[2 * gap.start + (gap.kind == "feedforward")])
        if fit.reads == "feedforward":
            output = outputs[gap.start - 1].reshape(*kept.shape, -1)[kept]
            before, after = output, output + (after - before)
        found[gap] = Seen(before, after, calls.get(gap.start - 1))
    return found


def _noting(calls: dict[int, tuple], place: int) -> Callable:
    def note(block: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        calls[place] = arguments[0], arguments[1:], named

    return note


def _keeping(outputs: dict[int, Tensor], place: int) -> Callable:
    def keep(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        outputs[place] = output

    return keep


def _begin(model: Any, gap: Gap) -> nn.Module:
    return deepcopy(blocks(model)[gap.start - 1]).float()


def _predicted(patch: Any, seen: Seen, kept: Tensor) -> Tensor:
    """What the patch makes of what it is given."""
    if seen.call is None:
        return patch(seen.before.float())
    hidden, arguments, named = seen.call
    return first(patch(hidden.float(), *arguments, **named))[kept]


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
    """Squared error of the patches over the energy of the removed updates, on up to 8 batches."""
    left = {gap: [0.0, 0.0] for gap in solved}
    for batch in batches[:8]:
        kept = batch.attention_mask.bool().to(next(model.parameters()).device)
        for gap, seen in observe(model, fits, batch).items():
            unpatched = seen.call[0][kept] if seen.call else seen.before
            left[gap][0] += float(
                (_predicted(solved[gap], seen, kept).double() - seen.after.double()).square().sum()
            )
            left[gap][1] += float((unpatched.double() - seen.after.double()).square().sum())
    return {gap.name: error / energy if energy else 0.0 for gap, (error, energy) in left.items()}
