"""Proof that a model with blocks removed is a model like any other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sddx.models.anatomy import blocks, decoder, per_layer_lists
from sddx.models.outputs import run
from sddx.records import UserError

PROMPT, NEW = 12, 6


class UnsoundModel(RuntimeError):
    """A check failed; the message names it."""


def prove(model: Any, *, vocabulary: int, again: Callable[[], Any] | None) -> dict[str, Any]:
    """Check the model and return what was found; raises UnsoundModel naming the check that failed.

    Checked: depth, layer indices and per-layer lists agree; `run` gives the model's own logits; decoding
    with the cache equals the pass without it; gradients reach every parameter that wants one; and the model
    that `again` saves and loads (None: not tried) gives the same logits bit for bit. `vocabulary` bounds the
    random token ids that are tried. Also measured: the bytes that the cache takes for a token.
    """
    device = next(model.parameters()).device
    ids = torch.randint(vocabulary, (2, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        found = {**_structure(model), **_head(model, ids, logits), **_cache(model, ids)}
        if again is not None:
            found |= _round_trip(again, ids, logits)
    return {**found, **_gradients(model, ids), "cache_bytes": cache_bytes(model)}


def cache_bytes(model: Any) -> int:
    """Bytes that the keys and values of one token take, over all blocks."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _require(holds: bool, check: str) -> None:
    if not holds:
        raise UnsoundModel(f"the pruned model is not sound: {check}")


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
        raise UnsoundModel(f"the pruned model is not sound: decoding with the cache fails: {error}") from error
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
        raise UnsoundModel(f"the pruned model is not sound: saving and loading fails: {error}") from error
    same = loaded(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    _require(torch.equal(same, logits), "the saved and reloaded model gives other logits")
    return {"reload_equal": True}


def _gradients(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """One backward pass; each gradient is dropped as soon as it was looked at, so that one weight's is held."""
    wanted = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    reached: set[str] = set()

    def note(name: str, weight: torch.Tensor) -> None:
        if weight.grad is not None and bool(weight.grad.isfinite().all()) and bool(weight.grad.any()):
            reached.add(name)
        weight.grad = None

    handles = [w.register_post_accumulate_grad_hook(partial(note, name)) for name, w in wanted.items()]
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            if wanted:
                logits.float().log_softmax(-1)[..., 0].sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    unreached = sorted(wanted.keys() - reached)
    _require(not unreached, f"no gradient, or one that is not finite, reaches {', '.join(unreached[:3])}")
    return {"gradients_reach": len(wanted)}
