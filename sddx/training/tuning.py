"""Which parameters of the student are trained: a LoRA adapter (on a base in 4 bit, if asked), or all of them."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from sddx.records import UserError


def lora(
    model: nn.Module,
    seed: int,
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
) -> PeftModel:
    """Puts a LoRA adapter (2106.09685), scaled by alpha / rank, on the linear layers named in `targets`.

    `all-linear` means every linear layer but the head. The initial adapter is a function of the seed and is
    float32 even on a bfloat16 base. The base weights are frozen. Raises UserError as `require_targets` does.
    """
    require_targets(model, targets)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config, autocast_adapter_dtype=True)


def qlora(
    model: nn.Module,
    seed: int,
    *,
    quantization: dict[str, Any],
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
) -> PeftModel:
    """`lora` on a base whose linear layers are in 4 bit (2305.14314).

    `quantization` says how (`sddx.models.load.four_bit`) and is applied when the base is loaded for training, to
    all blocks: a shared teacher is the unpruned model in 4 bit too. The saved adapter is an ordinary one, and is
    evaluated on the base in its own dtype. Raises UserError as `lora` does, ValueError where the base was not
    loaded so.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        raise ValueError(f"the base is to be loaded with quantization={quantization}")
    return lora(model, seed, rank=rank, alpha=alpha, dropout=dropout, targets=targets)


def full(model: nn.Module, seed: int) -> nn.Module:
    """Trains every parameter. Nothing is drawn: the seed is there because every tuning is called with one."""
    return model.requires_grad_(True)


def require_targets(model: nn.Module, targets: str | list[str]) -> None:
    """Raises UserError where a target names no linear layer of the model, and where there is no target."""
    if targets == "all-linear":
        return
    if not targets:
        raise UserError("tuning.targets is empty. Name linear layers, or use tuning.targets=all-linear.")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in [targets] if isinstance(targets, str) else targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise UserError(f"tuning.targets: no linear layer is named {target!r}; there are {known}")
