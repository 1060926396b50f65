"""Tiny random models of every supported family, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 64
WINDOW = 8
FAMILIES = ("llama", "mistral", "qwen3", "gemma3")
# Laid out in other ways: fused or learned positions, experts, parallel branches, other names, capped attention.
ALL_FAMILIES = (
    *FAMILIES, "phi3", "gpt_neox", "gpt_neox_serial", "opt", "mpt", "mixtral", "qwen3_moe", "qwen2", "gemma2",
)  # fmt: skip
EAGER = ("mpt", "gemma2")  # which attend by plain products alone


def _config(family: str, blocks: int) -> Any:
    shape: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    if family == "llama":
        return LlamaConfig(**shape)
    if family == "mistral":
        return MistralConfig(**shape, sliding_window=WINDOW)
    if family == "qwen3":  # the last blocks slide, the first attend to everything
        return Qwen3Config(**shape, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)
    if family in OTHERS:
        return OTHERS[family](shape)
    kinds = ["full_attention" if block % 3 == 1 else "sliding_attention" for block in range(blocks)]
    gemma = dict(sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=8, final_logit_softcapping=5.0)
    return Gemma3TextConfig(**shape, **gemma)


def _opt(shape: dict[str, Any], **given: Any) -> Any:
    plain = {name: value for name, value in shape.items() if name not in ("intermediate_size", "head_dim")}
    fitting = {n: v for n, v in plain.items() if n not in ("num_key_value_heads", "initializer_range")}
    return OPTConfig(**fitting, init_std=0.2, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, **given)


OTHERS: dict[str, Any] = {
    "phi3": lambda shape: Phi3Config(**shape),
    "gpt_neox": lambda shape: GPTNeoXConfig(**shape, use_parallel_residual=True),
    "gpt_neox_serial": lambda shape: GPTNeoXConfig(**shape, use_parallel_residual=False),
    "opt": _opt,
    "mpt": lambda shape: MptConfig(
        d_model=32, n_heads=4, n_layers=shape["num_hidden_layers"], vocab_size=VOCABULARY, max_seq_len=128,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ),
    "granite": lambda shape: GraniteConfig(
        **{n: v for n, v in shape.items() if n != "head_dim"}, logits_scaling=4.0, residual_multiplier=0.5
    ),
    "qwen2": lambda shape: Qwen2Config(**{n: v for n, v in shape.items() if n != "head_dim"}),
    # Its windows are wider than any text here; the cap is felt.
    "gemma2": lambda shape: Gemma2Config(
        **shape, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=5.0,
        attn_implementation="eager",
    ),
    "mixtral": lambda shape: MixtralConfig(**shape, num_local_experts=3, num_experts_per_tok=2),
    # The third block is dense: its number is written in the config.
    "qwen3_moe": lambda shape: Qwen3MoeConfig(
        **shape, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[2]
    ),
}  # fmt: skip

CLASSES: dict[str, Any] = {
    "granite": GraniteForCausalLM,
    "phi3": Phi3ForCausalLM,
    "gpt_neox": GPTNeoXForCausalLM,
    "gpt_neox_serial": GPTNeoXForCausalLM,
    "opt": OPTForCausalLM,
    "mpt": MptForCausalLM,
    "mixtral": MixtralForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "gemma2": Gemma2ForCausalLM,
    "gemma3": Gemma3ForCausalLM,
}


def build(family: str, *, blocks: int = 5, seed: int = 0) -> Any:
    """A random model in eval mode. Norm weights are random too, so that no norm stands for another."""
    torch.manual_seed(seed)
    model = CLASSES[family](_config(family, blocks))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def tokens(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length], longer than the sliding window."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def call_blocks_by_name(monkeypatch: Any, model: Any) -> None:
    """Let a Llama hand its blocks the hidden state by name, as some families do, while the test runs."""

    def by_name(block: Any, *arguments: Any, **named: Any) -> Any:
        hidden = {"hidden_states": arguments[0]} if arguments else {}
        return nn.Module._call_impl(block, *arguments[1:], **hidden, **named)

    monkeypatch.setattr(type(model.model.layers[0]), "_call_impl", by_name, raising=False)


def adapt(model: Any, seed: int = 1, targets: Any = "all-linear") -> Any:
    """The model with a LoRA adapter of random matrices: peft's own B is zero and changes nothing."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn_like(weight))
    return adapted.eval()
