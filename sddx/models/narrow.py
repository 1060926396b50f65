"""A model of the same architecture, depth and kinds of layers, but few channels, on which anything can be tried."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from sddx.errors import UserError

WIDTH, VOCABULARY = 32, 64
LARGEST = 50_000_000  # weights of a model that is only tried
HEADS = 4
EXPERTS = 4
# What a narrow model has of each: channels as a share of its width ..
SHARES = {
    "hidden_size": 1, "intermediate_size": 2, "ffn_dim": 2, "word_embed_proj_dim": 1, "intermediate_size_mlp": 2,
    "dense_intermediate_size": 2, "moe_intermediate_size": 1 / 2, "shared_expert_intermediate_size": 1 / 2,
    "shared_intermediate_size": 1 / 2, "moe_shared_expert_intermediate_size": 1 / 2,
    "head_dim": 1 / HEADS, "v_head_dim": 1 / HEADS, "global_head_dim": 1 / HEADS, "swa_head_dim": 1 / HEADS,
    "kv_channels": 1 / HEADS, "rotary_dim": 1 / HEADS, "query_pre_attn_scalar": 1 / HEADS,
    "kv_lora_rank": 1 / 2, "q_lora_rank": 1 / 2, "qk_nope_head_dim": 1 / (2 * HEADS),
    "qk_rope_head_dim": 1 / (2 * HEADS), "linear_key_head_dim": 1 / HEADS, "linear_value_head_dim": 1 / HEADS,
    "mamba_d_ssm": 2, "mamba_d_head": 2 / HEADS,
}  # fmt: skip
# .. or no more than so many. Heads of keys and values follow from those of queries.
MOST = {
    "num_attention_heads": HEADS, "swa_num_attention_heads": HEADS, "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS, "num_local_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "max_position_embeddings": 2048,
    "mamba_n_heads": HEADS, "mamba_d_state": 16, "mamba_chunk_size": 16,
    "hidden_size_per_layer_input": 8, "laurel_rank": 4, "index_n_heads": 2, "index_head_dim": 8,
}  # fmt: skip
KEY_HEADS = {
    "num_key_value_heads": "num_attention_heads", "num_global_key_value_heads": "num_attention_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
}  # fmt: skip


def refusals() -> tuple[type[Exception], ...]:
    """What transformers and torch raise over settings that do not go together."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError,
        StrictDataclassError, TypeError, ValueError,
    )  # fmt: skip


def narrow(config: Any, *, width: int, vocabulary: int, **settings: Any) -> Any:
    """The config of a model that is `width` channels wide and knows `vocabulary` ids, with the same depth and
    per-layer settings; `settings` are changed besides. Raises UserError for a width that its heads cannot share,
    and where transformers takes no such config."""
    if not isinstance(width, int) or width < 2 * HEADS or width % (2 * HEADS):
        raise UserError(
            f"a model cannot be {width} channels wide: {HEADS} heads share them, in pairs. Give a multiple of "
            f"{2 * HEADS}."
        )
    if not hasattr(config.get_text_config(), "num_hidden_layers"):
        raise UserError(
            f"the config of a {config.model_type} model states no number of blocks (num_hidden_layers)."
        )
    made = deepcopy(config)
    try:
        for part in _parts(made):
            for name, value in (_small(part, width, vocabulary) | (settings if part is made else {})).items():
                _set(part, name, value)
            head = part.head_dim if hasattr(part, "head_dim") else width // HEADS
            _shorten_rotation(getattr(part, "rope_parameters", None) or {}, head)
    except refusals() as error:
        raise UserError(f"a {config.model_type} model cannot be {width} channels wide: {error}.") from error
    return made


def smallest(config: Any) -> Any:
    """The config of the narrow model on which anything is tried, of WIDTH channels and VOCABULARY ids. Raises
    UserError as `narrow` and `built` do, and where a model of it would not be small."""
    small = narrow(config, width=WIDTH, vocabulary=VOCABULARY)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in built(small, torch.float32).parameters())
    if size > LARGEST:
        raise UserError(f"a {config.model_type} model cannot be made narrow: {size:,} weights are left.")
    return small


def _parts(config: Any) -> list[Any]:
    """A config and those inside it, of a text model beside others."""
    from transformers import PreTrainedConfig

    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(part for each in inner if isinstance(each, PreTrainedConfig) for part in _parts(each))]


def _small(config: Any, width: int, vocabulary: int) -> dict[str, int]:
    """The settings that make a model narrow, where it has them."""
    small = {name: max(int(width * share), 1) for name, share in SHARES.items()}
    for name, most in MOST.items():
        if isinstance(now := getattr(config, name, None), int):
            small[name] = min(now, most)
    for name, queries in KEY_HEADS.items():
        if isinstance(now := getattr(config, name, None), int) and now:
            small[name] = max(small[queries] * now // getattr(config, queries), 1)
    if getattr(config, "qk_rope_head_dim", None):  # latent attention turns these channels alone
        small["head_dim"] = small["qk_rope_head_dim"]
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    for name, value in vars(config).items():
        if name.endswith("token_id") and isinstance(value, int):
            small[name] = min(value, vocabulary - 1)
    return small | {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}


def _set(config: Any, name: str, value: Any) -> None:
    """A setting that the config has, whatever it calls it; one for each layer stays one for each."""
    now = getattr(config, name, None)
    if isinstance(getattr(type(config), name, None), property):  # follows from others
        return
    if isinstance(now, list) and isinstance(value, int):
        value = [value] * len(now)
    if now is not None or (name == "head_dim" and hasattr(config, name)):
        setattr(config, name, value)


def _shorten_rotation(rotation: dict[str, Any], head: int) -> None:
    """Factors by which rotary frequencies are stretched are one for each pair of a head's channels that are turned;
    some families have them by kind of layer."""
    pairs = int(head * (rotation.get("partial_rotary_factor") or 1)) // 2
    for name, value in rotation.items():
        if isinstance(value, dict):
            _shorten_rotation(value, head)
        elif isinstance(value, list):
            rotation[name] = value[:pairs]


def built(config: Any, dtype: torch.dtype, **options: Any) -> nn.Module:
    """The model of this config with random weights, the same ones each time. Raises UserError where transformers
    makes none."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        except refusals() as error:
            raise UserError(f"no {config.model_type} model is made of this config: {error}.") from error
