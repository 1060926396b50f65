"""Students on disk: an adapter or full weights, tied to the cut and the base model that they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sddx.models.anatomy import Stack, is_adapted
from sddx.models.load import load_model
from sddx.records import Cut, UserError
from sddx.surgery.remove import remove_blocks


def save_student(model: Any, folder: Path, *, cut: Cut, base: str) -> None:
    """Write the adapter (of a peft model) or all weights, with `cut.json` and `base.json` beside them.

    `base` is the content key of the unpruned model. A LoRA adapter loads onto any model with blocks of the
    same names, and lands on the wrong ones with one warning; so it carries what it belongs to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_adapted(model):
        # Left to itself, peft asks the hub whether the vocabulary was resized.
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        model.save_pretrained(folder)
    cut.save(folder / "cut.json")
    (folder / "base.json").write_text(json.dumps({"base": base}) + "\n")


def load_student(
    base_folder: Path,
    folder: Path | None,
    *,
    cut: Cut,
    base: str,
    dtype: str = "float32",
    attention: str = "sdpa",
    device: str = "cpu",
) -> tuple[Any, Stack | None]:
    """The pruned model (`folder` None) or the recovered one, in eval mode and frozen, and the base model's
    blocks, with which its weights are the unpruned model (`SharedTeacher`).

    An adapter is put onto the base model after the cut; full weights are loaded alone, without those blocks.
    Raises UserError where what is stored belongs to another cut or another base, or where weights are missing
    or left over.
    """
    if folder is not None:
        _require_same_origin(folder, cut, base)
        if not (folder / "adapter_config.json").is_file():
            alone = load_model(folder, dtype=dtype, attention=attention, device=device)
            return alone.requires_grad_(False), None
    model = load_model(base_folder, dtype=dtype, attention=attention, device=device).requires_grad_(False)
    unpruned = remove_blocks(model, cut)
    return (model if folder is None else _adapt(model, folder).to(device).eval()), unpruned


def _require_same_origin(folder: Path, cut: Cut, base: str) -> None:
    """The guard: same cut and same base, or no student."""
    try:
        stored_cut = Cut.load(folder / "cut.json")
        stored_base = json.loads((folder / "base.json").read_text())["base"]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{folder} does not say which cut and base model it belongs to ({error}). Only students that "
            f"sddx saved (with cut.json and base.json) can be loaded."
        ) from error
    if stored_cut != cut:
        raise UserError(
            f"the student in {folder} was trained with blocks {list(stored_cut.removed)} of "
            f"{stored_cut.total} removed, and {list(cut.removed)} of {cut.total} were asked for. "
            f"Load it with its own cut."
        )
    if stored_base != base:
        raise UserError(
            f"the student in {folder} belongs to base model {stored_base}, and {base} was given. Load it "
            f"with the model it was trained from."
        )


def _adapt(model: Any, folder: Path) -> Any:
    """Put the stored adapter on, and see that every one of its weights found its place."""
    from peft import PeftModel, get_peft_model_state_dict

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} holds no adapter_model.safetensors, and pickles are never loaded.")
    adapted = PeftModel.from_pretrained(model, str(folder))
    with safe_open(weights, framework="pt") as stored:
        astray = set(stored.keys()) ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if astray:
        raise UserError(
            f"the adapter in {folder} does not fit the model: {len(astray)} weights are missing or left over "
            f"({', '.join(sorted(astray)[:3])}). Its files were changed; train it again."
        )
    return adapted
