"""Proof that a model with blocks removed is a model like any other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from sddx.compression.remove import kept_blocks
from sddx.errors import UserError
from sddx.models.anatomy import (
    INDICES,
    Stack,
    bare,
    blocks,
    decoder,
    final_norm,
    per_layer_lists,
    set_blocks,
    stack,
)
from sddx.models.outputs import entering, first, head_of, run, with_state
from sddx.records import Cut

PROMPT, NEW, PADDING = 12, 6, 3
LARGEST_COPY = 2e9  # bytes of weights; beyond this a proof makes no copy of them, in memory or on disk
UNSOUND = "the pruned model is not sound"
ADVICE = "Remove other blocks, or use another model: sddx families prints what was found sound."


class UnsoundModel(UserError):
    """A check failed; the message names it."""


def prove(
    model: Any,
    *,
    vocabulary: int,
    again: Callable[[], Any] | None,
    sliced: torch.Tensor | None = None,
    whole: Stack | None = None,
) -> dict[str, Any]:
    """Check the model and return what was found; raises UnsoundModel naming the check that failed.

    Checked: depth, layer indices and per-layer lists agree; `run` gives the model's own logits; these are those of
    the kept blocks run one after the other (`sliced`, of `sliced_logits`; None: not compared); padding changes
    none, on the right as in training and on the left as in `generate`; decoding with the cache equals the pass
    without it; gradients reach every parameter that wants one and gets one in the `whole` model; and the model that
    `again` saves and loads (None: not tried) gives the same logits bit for bit (of experts, but for rounding).
    `vocabulary` bounds the random token ids that are tried. Also measured: the bytes that the cache takes for a
    token. What padding and the cache change is told from rounding: in half precision, where a cut may leave a model
    that blows rounding up, by a copy in float32 as well, where there is room for one.
    """
    ids = _tokens(model, vocabulary)
    with _failures_told(), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        proof = {**_structure(model), **_head(model, ids, logits)}
        if sliced is not None:
            _require(torch.equal(logits, sliced), "its logits are not those of the kept blocks")
        proof |= _rounded(model, ids, logits)
        if again is not None:
            proof |= _round_trip(again, ids, logits)
        return {**proof, **_gradients(model, ids, whole), "cache_bytes": cache_bytes(model)}


def sliced_logits(model: Any, cut: Cut, *, vocabulary: int) -> torch.Tensor:
    """The logits that a whole model gives where each block that the cut keeps is called as the model calls it, with
    the state that the kept block before it gave: what the cut is to leave. Raises UnsoundModel where blocks cannot
    be called so."""
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def note(block: torch.nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        calls.append((arguments, named))

    ids = _tokens(model, vocabulary)
    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks(model)]
    try:
        with _failures_told(), torch.no_grad():
            run(model, ids, torch.ones_like(ids))
            kept = kept_blocks(model, cut)
            return _one_by_one(model, kept, [calls[block] for block in (0, *cut.kept)])
    finally:
        for handle in handles:
            handle.remove()


def _one_by_one(model: Any, kept: Sequence[Any], calls: Sequence[tuple[tuple, dict[str, Any]]]) -> torch.Tensor:
    """The first call gives the state that enters; of the others, one for each block, all else."""
    hidden = entering(*calls[0])
    for block, call in zip(kept, calls[1:], strict=True):
        arguments, named = with_state(hidden, *call)
        hidden = first(block(*arguments, **named))
    norm = final_norm(model)
    return head_of(model)(hidden if norm is None else norm(hidden))


def is_small(model: Any) -> bool:
    """Whether a proof may copy the weights."""
    return sum(weight.nbytes for weight in model.parameters()) < LARGEST_COPY


def _tokens(model: Any, vocabulary: int) -> torch.Tensor:
    """Random token ids [2, PROMPT], the same ones each time."""
    ids = torch.randint(vocabulary, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


@contextmanager
def _failures_told() -> Iterator[None]:
    """What a library raises over a model that does not hold together is told as that model's fault."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise UnsoundModel(f"{UNSOUND}: {type(e).__name__}: {e}. {ADVICE}") from e


def cache_bytes(model: Any) -> int:
    """Bytes that the keys and values of one token take, over all blocks."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


def _require(holds: bool, check: str) -> None:
    if not holds:
        raise UnsoundModel(f"{UNSOUND}: {check}. {ADVICE}")


def _structure(model: Any) -> dict[str, Any]:
    body, depth = decoder(model), len(blocks(model))
    stated = body.config.num_hidden_layers
    _require(stated == depth, f"num_hidden_layers is {stated} and there are {depth} blocks")
    for position, block in enumerate(blocks(model)):
        indices = {vars(module)[name] for module in block.modules() for name in INDICES & vars(module).keys()}
        _require(indices <= {position}, f"block {position} carries layer_idx {sorted(indices)}")
    for name, value in vars(body.config).items():
        # A list that was not cut can only be known by its name.
        known = name.endswith("layer_types") and value is not None
        _require(not known or len(value) == depth, f"{name} has not one entry for each of {depth} blocks")
    return {"blocks": depth, "per_layer_lists": sorted(per_layer_lists(body.config))}


def _head(model: Any, ids: torch.Tensor, logits: torch.Tensor) -> dict[str, Any]:
    outputs = run(model, ids, torch.ones_like(ids))
    same = torch.equal(outputs.head(outputs.hidden), logits)
    _require(same, "body and head give other logits than the whole model")
    return {"head_equals_model": True}


def _rounded(model: Any, ids: torch.Tensor, logits: torch.Tensor) -> dict[str, Any]:
    """What padding and the cache change, which must be rounding alone."""
    try:
        return {**_padding(model, ids, logits), **_cache(model, ids)}
    except UnsoundModel:
        if next(model.parameters()).dtype.itemsize >= 4 or not is_small(model):
            raise
        wide = deepcopy(model).float()
        exact = wide(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return {**_padding(wide, ids, exact), **_cache(wide, ids), "rounding_told_in": "float32"}


def _padding(model: Any, ids: torch.Tensor, logits: torch.Tensor) -> dict[str, Any]:
    """The logits of a row do not hang on what fills its batch up. On the left, positions are counted from the first
    token that is attended to, as `generate` does."""
    numbered = "position_ids" in inspect.signature(bare(model).forward).parameters
    padded, mask = (functional.pad(row, (0, PADDING)) for row in (ids, torch.ones_like(ids)))
    differences = {}
    for side, shift in (("right", 0), ("left", PADDING)):
        seen = mask.roll(shift, 1)
        positions = {"position_ids": (seen.cumsum(1) - 1).clamp(min=0)} if numbered and shift else {}
        made = model(input_ids=padded.roll(shift, 1), attention_mask=seen, use_cache=False, **positions).logits
        differences[side] = _difference(made[seen.bool()].reshape(logits.shape), logits, model)
        _require(differences[side] is not None, f"padding on the {side} changes its logits")
    return {f"padded_{side}_difference": difference for side, difference in differences.items()}


def _difference(made: torch.Tensor, expected: torch.Tensor, model: Any) -> float | None:
    """How far two models of the same logits lie apart; None where that is more than rounding."""
    # Square root of the dtype's resolution: far above rounding, far below what a wrong block would do.
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max()
    differences = (made - expected).abs().amax(-1)
    # In half precision a router's near tie may send single tokens to another expert.
    routed = _has_experts(model) and expected.dtype.itemsize < 4
    difference = differences.float().median() if routed else differences.max()
    return float(difference) if difference <= tolerance else None


def _cache(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Decode greedily with the cache, then give the whole text to one pass without it: at every step the
    logits agree. (Not through `generate`, where a model's own penalties would change the choice of tokens.)
    """
    text, step, cache, steps = ids, ids, None, []
    try:
        for _ in range(NEW):
            seen = torch.ones_like(text)
            made = model(input_ids=step, attention_mask=seen, past_key_values=cache, use_cache=True)
            cache, step = made.past_key_values, made.logits[:, -1:].argmax(-1)
            steps.append(made.logits[:, -1])
            text = torch.cat([text, step], dim=1)
    except (RuntimeError, IndexError) as error:
        raise UnsoundModel(f"{UNSOUND}: decoding with the cache fails: {error}. {ADVICE}") from error
    cached = torch.stack(steps, dim=1)
    plain = model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits
    plain = plain[:, ids.shape[1] - 1 : -1]
    difference = _difference(cached, plain, model)
    _require(difference is not None, f"cached and uncached logits differ by {(cached - plain).abs().max():.3g}")
    same = torch.equal(plain.argmax(-1), text[:, ids.shape[1] :])  # in half precision near ties may swap
    return {"cached_difference": difference, "cached_tokens_equal": same}


def _round_trip(again: Callable[[], Any], ids: torch.Tensor, logits: torch.Tensor) -> dict[str, Any]:
    try:
        loaded = again()
    except (UserError, ValueError) as error:
        raise UnsoundModel(f"{UNSOUND}: saving and loading fails: {error}. {ADVICE}") from error
    same = loaded(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    # Experts are multiplied in another order where their weights lie otherwise in memory.
    near = _has_experts(loaded) and _difference(same, logits, loaded) is not None
    _require(
        torch.equal(same, logits) or near,
        "the saved and reloaded model gives other logits: something in a block hangs on its number or the depth",
    )
    return {"reload_equal": torch.equal(same, logits)}


def _has_experts(model: Any) -> bool:
    return any(hasattr(module, "experts") for module in model.modules())


def _gradients(model: Any, ids: torch.Tensor, whole: Stack | None) -> dict[str, Any]:
    """That a weight gets no gradient is the cut's fault where it gets one in the whole model, whatever the tokens:
    not in a router and its experts, which some tokens meet and others do not."""
    wanted = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    lost = wanted.keys() - _reached(model, wanted, ids)
    routed = [name for name, module in model.named_modules() if hasattr(module, "experts")]
    lost = {name for name in lost if not any(name.startswith(f"{each}.") for each in routed)}
    if lost and whole is not None:
        pruned = stack(model)
        set_blocks(model, whole)
        try:
            lost &= _reached(model, {name: wanted[name] for name in lost}, ids)
        finally:
            set_blocks(model, pruned)
    _require(not lost, f"no gradient, or one that is not finite, reaches {', '.join(sorted(lost)[:3])}")
    return {"gradients_reach": len(wanted)}


def _reached(model: Any, weights: dict[str, Any], ids: torch.Tensor) -> set[str]:
    """Which of these weights a backward pass gives a finite gradient. Each is dropped as soon as it was looked at,
    so that one weight's is held."""
    reached: set[str] = set()

    def note(name: str, weight: torch.Tensor) -> None:
        if weight.grad is not None and bool(weight.grad.isfinite().all()) and bool(weight.grad.any()):
            reached.add(name)
        weight.grad = None

    handles = [w.register_post_accumulate_grad_hook(partial(note, name)) for name, w in weights.items()]
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            if weights:
                logits.float().log_softmax(-1)[..., 0].sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return reached
