"""The random model on which most of this is measured."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_llama(dtype: torch.dtype = torch.float32) -> Any:
    """16 blocks of 512, vocabulary 32,000: 83M parameters, the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=1_376, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=2_048,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
