"""Where the parts of a decoder-only language model sit. Every function sees through a peft wrapper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sddx.records import UserError

SUPPORTED = "Llama, Mistral, Qwen2, Qwen3, Gemma2 and Gemma3 (text)"


@dataclass(frozen=True)
class Stack:
    """The blocks of a model in order, and the config lists that hold one entry for each of them."""

    blocks: nn.ModuleList
    lists: dict[str, list]


def is_adapted(model: Any) -> bool:
    """Whether peft wraps the model. (Asked of the object, because importing peft takes seconds.)"""
    return hasattr(model, "get_base_model")


def bare(model: Any) -> Any:
    """The causal language model inside a peft wrapper; any other model is returned as it is."""
    return model.get_base_model() if is_adapted(model) else model


def decoder(model: Any) -> Any:
    """The body: embeddings, blocks and final norm, without the head.

    Raises UserError where the architecture has no such shape, or shares keys and values between blocks.
    """
    whole = bare(model)
    body: Any = getattr(whole, "model", None)
    shaped = isinstance(getattr(body, "layers", None), nn.ModuleList) and hasattr(whole, "lm_head")
    if not shaped or not all(hasattr(body, part) for part in ("embed_tokens", "rotary_emb", "norm")):
        raise UserError(
            f"blocks cannot be found in a {type(whole).__name__}: a decoder-only model with model.layers, "
            f"model.norm, model.rotary_emb and lm_head is needed. Use one of {SUPPORTED}."
        )
    if getattr(body.config, "num_kv_shared_layers", 0):
        raise UserError(
            f"a {type(whole).__name__} cannot be pruned: its last {body.config.num_kv_shared_layers} blocks "
            f"reuse keys and values of earlier blocks, found by counting from the end "
            f"(num_kv_shared_layers). Use one of {SUPPORTED}."
        )
    return body


def blocks(model: Any) -> nn.ModuleList:
    """The transformer blocks, in the order in which they run."""
    return decoder(model).layers


def final_norm(model: Any) -> nn.Module:
    """The norm between the last block and the head."""
    return decoder(model).norm


def head(model: Any) -> nn.Module:
    """The projection from hidden state to vocabulary, before any softcapping of the logits."""
    decoder(model)
    return bare(model).lm_head


def rotary(model: Any) -> nn.Module:
    """The module that makes rotary position embeddings for all blocks."""
    return decoder(model).rotary_emb


def embeddings(model: Any) -> nn.Module:
    """The token embeddings."""
    return decoder(model).embed_tokens


def per_layer_lists(config: Any) -> dict[str, list]:
    """The config attributes that hold one entry per block (`layer_types` and its like), by name.

    Known by their length; lists that say something else may have that length by chance in a small model.
    """
    return {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple))
        and len(value) == config.num_hidden_layers
        and name != "architectures"
        and not name.endswith(("token_id", "token_ids", "tokens"))
    }


def stack(model: Any) -> Stack:
    """The model's present blocks and per-layer lists, to be put back with `set_blocks`."""
    body = decoder(model)
    return Stack(body.layers, per_layer_lists(body.config))


def set_blocks(model: Any, new: Stack) -> None:
    """Put these blocks into the model, with depth, per-layer lists and layer indices to match.

    The four go together: transformers runs `layers[:num_hidden_layers]`, some families index
    `layer_types[i]`, and the cache is addressed by each module's `layer_idx`.
    """
    body = decoder(model)
    body.layers = new.blocks
    body.config.num_hidden_layers = len(new.blocks)
    for name, values in new.lists.items():
        setattr(body.config, name, list(values))
    for index, block in enumerate(new.blocks):
        for module in block.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = index  # type: ignore[assignment]
