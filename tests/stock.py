"""A model of a folder as transformers and peft alone read it."""

from __future__ import annotations

import sys
from pathlib import Path


def logits(folder: Path, adapter: Path | None, out: Path) -> None:
    """Writes what it says to the first forty tokens, in float32, where nothing of ours was imported."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    AutoTokenizer.from_pretrained(folder)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    assert not any(name.startswith("sddx") for name in sys.modules)
    torch.save(model.eval()(torch.arange(40)[None]).logits.detach(), out)
