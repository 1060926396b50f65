"""Proof that a model with blocks removed is a model like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from sddx.compression.remove import kept_blocks
from sddx.errors import UserError
from sddx.models.anatomy import (
    SUPPORTED,
    Stack,
    blocks,
    decoder,
    final_norm,
    per_layer_lists,
    set_blocks,
    stack,
)
from sddx.models.outputs import first, head_of, run
from sddx.records import Cut

PROMPT, NEW = 12, 6
UNSOUND = "the pruned model is not sound"
ADVICE = f"Remove other blocks, or use one of {SUPPORTED}."


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
    the kept blocks run one after the other (`sliced`, of `sliced_logits`; None: not compared); decoding with the
    cache equals the pass without it; gradients reach every parameter that wants one and gets one in the `whole`
    model; and the model that `again` saves and loads (None: not tried) gives the same logits bit for bit.
    `vocabulary` bounds the random token ids that are tried. Also measured: the bytes that the cache takes for a
    token.
    """
    ids = _tokens(model, vocabulary)
    with _failures_told(), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        found = {**_structure(model), **_head(model, ids, logits)}
        if sliced is not None:
            _require(torch.equal(logits, sliced), "its logits are not those of the kept blocks")
        found |= _cache(model, ids)
        if again is not None:
            found |= _round_trip(again, ids, logits)
        return {**found, **_gradients(model, ids, whole), "cache_bytes": cache_bytes(model)}


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
    arguments, named = calls[0]
    hidden = arguments[0] if arguments else named["hidden_states"]
    for block, (arguments, named) in zip(kept, calls[1:], strict=True):
        if arguments:
            hidden = first(block(hidden, *arguments[1:], **named))
        else:
            hidden = first(block(**{**named, "hidden_states": hidden}))
    norm: Any = final_norm(model)
    return head_of(model)(hidden if norm is None else norm(hidden))


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
        indices = {vars(module)["layer_idx"] for module in block.modules() if "layer_idx" in vars(module)}
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
    # Square root of the dtype's resolution: far above rounding, far below what a wrong block would do.
    tolerance = torch.finfo(plain.dtype).eps ** 0.5 * plain.abs().max()
    differences = (cached - plain).abs().amax(-1)
    # In half precision a router's near tie may send single tokens to another expert.
    routed = any(hasattr(module, "experts") for module in model.modules()) and plain.dtype.itemsize < 4
    difference = differences.float().median() if routed else differences.max()
    _require(bool(difference <= tolerance), f"cached and uncached logits differ by {difference:.3g}")
    same = torch.equal(plain.argmax(-1), text[:, ids.shape[1] :])  # in half precision near ties may swap
    return {"cached_difference": float(difference), "cached_tokens_equal": same}


def _round_trip(again: Callable[[], Any], ids: torch.Tensor, logits: torch.Tensor) -> dict[str, Any]:
    try:
        loaded = again()
    except (UserError, ValueError) as error:
        raise UnsoundModel(f"{UNSOUND}: saving and loading fails: {error}. {ADVICE}") from error
    same = loaded(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    _require(
        torch.equal(same, logits),
        "the saved and reloaded model gives other logits: something in a block hangs on its number or the depth",
    )
    return {"reload_equal": True}


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
