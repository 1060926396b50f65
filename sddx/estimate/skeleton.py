"""A model without weights, on the meta device, and what can be counted on it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sddx.compression.branches import NoAttention
from sddx.compression.choose import last
from sddx.compression.remove import apply_cut
from sddx.compression.soundness import cache_bytes
from sddx.errors import UserError
from sddx.models.anatomy import blocks, decoder, head
from sddx.models.load import DTYPES, locate, said, text_config
from sddx.models.narrow import refusals
from sddx.records import Cut, Units

TRACED = "sddx_traced"
MET = ("num_experts_per_tok", "moe_topk")  # what configs call the experts that a token is sent to


@dataclass(frozen=True)
class Size:
    """What a model takes and what a token costs.

    `matrices` are the weights that every token is multiplied with, without the head and the looked-up embeddings
    (of experts, those that a token is sent to); `attention` the multiplications per token and attended token.
    """

    parameters: int
    matrices: int
    head: int
    attention: int
    cache_bytes: int
    weight_bytes: int
    blocks: int

    def body(self, context: float) -> float:
        """FLOPs a token of all but the head when `context` tokens are read at once. Every token is counted as
        attending to all of them (the full square, as PyTorch's counter does)."""
        return 2 * (self.matrices + self.attention * context)

    def prefill(self, context: float) -> float:
        """FLOPs a token when `context` tokens are read at once and the last one's logits are wanted."""
        return self.body(context) + 2 * self.head / max(context, 1)

    def decode(self, context: float) -> float:
        """FLOPs of the one token that follows `context - 1` others in the cache."""
        return self.body(context) + 2 * self.head

    def step(self, rows: float, cached: float) -> float:
        """FLOPs of one step of decoding in which so many rows write a token each, and attend to `cached` tokens
        together."""
        return 2 * (rows * (self.matrices + self.head) + self.attention * cached)


def shape_of(model: dict[str, Any]) -> Any:
    """The config of a `model` node: of its stated dimensions, which need no hub, or of its folder.

    Raises UserError where it has neither, or dimensions that transformers does not take.
    """
    stated = model.get("dimensions")
    if not stated:
        return text_config(locate(model["path"], revision=model["revision"])[0])
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**stated).get_text_config()
    except refusals() as error:
        raise UserError(
            f"model.dimensions are none of a model that transformers knows: {said(error)}. Given: {stated}. "
            "Copy them from the model's config.json."
        ) from error


def skeleton(config: Any, dtype: str) -> Any:
    """The causal language model of this config on the meta device, in eval mode and frozen."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(TRACED, _attend)
    attention = "eager" if config.model_type == "mpt" else TRACED  # MPT computes its scores itself
    with torch.device("meta"):
        # Of a copy: transformers writes into a config how its model attends.
        model = AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=DTYPES[dtype], attn_implementation=attention
        )
    return model.eval().requires_grad_(False)


def removed(model: Any, units: str, count: int) -> Cut:
    """The cut that takes the last `count` units but one, and applies it: of equal blocks, which go does not matter
    to a count. Raises UserError where there are fewer."""
    kinds = Units(units, len(blocks(model)))
    cut = kinds.cut(last(None, len(kinds), count))
    apply_cut(model, cut)
    return cut


def size_of(model: Any) -> Size:
    """Count a model, whole or cut."""
    config = decoder(model).config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attending = sum(not any(isinstance(m, NoAttention) for m in block.modules()) for block in blocks(model))
    weights = list(model.parameters())
    return Size(
        parameters=sum(weight.numel() for weight in weights),
        matrices=_matrices(decoder(model), config),
        head=head(model).weight.numel(),
        attention=2 * attending * config.num_attention_heads * width,
        cache_bytes=cache_bytes(model),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        blocks=len(blocks(model)),
    )


def _matrices(body: nn.Module, config: Any) -> int:
    """The weights of linear layers and of routers [experts, ..]; of stacked experts [experts, .., ..] those that a
    token meets."""
    met = next((count for name in MET if (count := getattr(config, name, None))), 1)
    total = sum(m.weight.numel() for m in body.modules() if isinstance(m, nn.Linear))
    others = [m for m in body.modules() if not isinstance(m, (nn.Linear, nn.Embedding, nn.Conv1d))]
    weights = [w for m in others for name, w in m.named_parameters(recurse=False) if "bias" not in name]
    stacked = [w for w in weights if w.dim() == 3]
    routers = [w for w in weights if w.dim() == 2 and len(w) in {len(each) for each in stacked}]
    return total + sum(w.numel() for w in routers) + sum(w[0].numel() * min(met, len(w)) for w in stacked)


class _Attention(torch.autograd.Function):
    """Attention as a fused kernel holds it: queries, keys, values, output and one number a row; no scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = _laid_out(query)
        rows = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _laid_out(query: torch.Tensor) -> torch.Tensor:
    """Room for the output [batch, heads, time, width], laid out by time, as fused kernels write it."""
    batch, heads, time, width = query.shape
    return torch.empty(batch, time, heads, width, dtype=query.dtype, device=query.device).transpose(1, 2)


def _attend(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> tuple[Any, None]:
    made = _Attention.apply(query, key, value) if torch.is_grad_enabled() else _laid_out(query)
    return made.transpose(1, 2).contiguous(), None
