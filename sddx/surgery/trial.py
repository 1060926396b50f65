"""A cut tried out on a narrow model of the same family: what is proven of a pruned model, before one is there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sddx.models.load import load_model
from sddx.models.narrow import built, narrow
from sddx.models.outputs import require_own_head
from sddx.models.student import saved_and_loaded
from sddx.records import Cut, UserError
from sddx.surgery.remove import apply_cut
from sddx.surgery.soundness import UnsoundModel, prove, sliced_logits

WIDTH, VOCABULARY = 32, 64
_mistakes: dict[tuple[str, Cut, str], str] = {}


def try_out(config: Any, cut: Cut, attention: str) -> bool:
    """Whether a narrow model of this config can be made. If so it was saved, loaded, cut, saved and loaded again,
    and proven, as the model itself will be; UserError where it failed: in the head, or in what the cut leaves."""
    asked = config.to_json_string(use_diff=False), cut, attention
    if asked not in _mistakes:
        try:
            model = built(
                narrow(config, width=WIDTH, vocabulary=VOCABULARY), torch.float32, attn_implementation=attention
            )
        except UserError:
            return False
        _mistakes[asked] = _mistake(model, cut, attention)
    if wrong := _mistakes[asked]:
        raise UnsoundModel(f"tried on a narrow model with random weights of {type(config).__name__}, {wrong}")
    return True


def _mistake(model: nn.Module, cut: Cut, attention: str) -> str:
    """What is wrong with such a model or what the cut leaves of it; nothing where all is well."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for weight in model.parameters():  # at first many are 0 or 1, and one stands for another
            weight.add_(0.05 * torch.randn_like(weight))
    try:
        _prove(model, cut, attention)
    except UserError as error:
        return str(error)
    return ""


def _prove(made: Any, cut: Cut, attention: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made.save_pretrained(folder)
        model = load_model(folder, attention=attention)
        require_own_head(model)
        sliced = sliced_logits(model, cut, vocabulary=VOCABULARY)
        whole = apply_cut(model, cut)

        def again() -> Any:
            how = {"dtype": "float32", "attention": attention}
            return saved_and_loaded(model, folder, cut=cut, base="", patch=None, attached={}, **how)

        prove(model, vocabulary=VOCABULARY, again=again, sliced=sliced, whole=whole)
