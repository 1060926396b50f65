"""Students on disk: an adapter or full weights, tied to the cut and the base model that they belong to."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_model as load_into
from safetensors.torch import save_model

from sddx.compression.compressed import Compressed, Compression, compress
from sddx.compression.remove import cut_of
from sddx.errors import UserError
from sddx.models.anatomy import is_adapted
from sddx.models.load import load_model, loading_device, placed
from sddx.parallel.distributed import is_joined
from sddx.records import CUT_FILE, Cut

OWN_WEIGHTS = "student.safetensors"


def save_student(made: Compressed, folder: Path, *, base: str) -> None:
    """Write the adapter (of a peft model) or all weights, with `base.json` and what each compression keeps beside
    them: `cut.json`, weights of patches.

    `base` is the content key of the unpruned model. A LoRA adapter loads onto any model with blocks of the
    same names, and lands on the wrong ones with one warning; so it carries what it belongs to. A model that no
    stock loader knows (branches removed, patches as modules) is written under its parameters' own names, to be
    loaded into the base model after the same compression.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_adapted(made.model):
        # Left to itself, peft asks the hub whether the vocabulary was resized.
        made.model.save_pretrained(folder, save_embedding_layers=False)
    elif made.own or not made.is_stock:
        save_model(made.model, str(folder / OWN_WEIGHTS))
    else:
        made.model.save_pretrained(folder)
    for each in made.done:
        each.keep(made, folder)
    write_origin(folder, made.cut, base)


def write_origin(folder: Path, cut: Cut, base: str) -> None:
    """Tie what a folder holds to its cut, and to its base model by the content key of that."""
    cut.save(folder / CUT_FILE)
    (folder / "base.json").write_text(json.dumps({"base": base}) + "\n", encoding="utf-8")


def load_student(
    base_folder: Path,
    folder: Path | None,
    *,
    done: Sequence[Compression],
    base: str,
    dtype: str = "float32",
    attention: str = "sdpa",
    device: str = "cpu",
) -> Compressed:
    """The pruned model (`folder` None) or the recovered one, in eval mode and frozen; in a group of processes its
    blocks are in shards.

    `done` is what was done to the base model. An adapter is put on after that; full weights are loaded alone where
    a stock loader can. Raises UserError where what is stored belongs to another cut or another base, or where
    weights are missing or left over.
    """
    loading = {"dtype": dtype, "attention": attention, "device": loading_device(device)}
    made = _loaded(base_folder, folder, done, base, loading)
    if is_joined() and made.whole and made.has_twins:
        made.whole = {}
    placed(made.model, device, *(block for stack in made.whole.values() for block in stack.blocks))
    return made


def _loaded(
    base_folder: Path, folder: Path | None, done: Sequence[Compression], base: str, loading: dict[str, str]
) -> Compressed:
    cut = cut_of(done)
    if folder is not None:
        _require_same_origin(folder, cut, base)
    if folder is not None and (folder / "config.json").is_file():
        return Compressed(load_model(folder, **loading).requires_grad_(False), cut, tuple(done))
    made = compress(load_model(base_folder, **loading).requires_grad_(False), done)
    if folder is None:
        return made
    for each in done:
        each.restore(made, folder)
    if (folder / OWN_WEIGHTS).is_file():
        _restore(made.model, folder / OWN_WEIGHTS)
        made.whole = {}
    else:
        made.model = _adapt(made.model, folder).eval()
    return made


def saved_and_loaded(made: Compressed, base_folder: Path, *, base: str, **loading: str) -> Any:
    """The student as it comes back from a folder: by its own way, or, where a stock loader can, by that."""
    with tempfile.TemporaryDirectory() as name:
        save_student(made, Path(name), base=base)
        return load_student(base_folder, Path(name), done=made.done, base=base, **loading).model


def _restore(model: Any, file: Path) -> None:
    """Load all weights by their own names; each must find its place."""
    try:
        # Weights are written into those of the base model, whose removed blocks are of no more use.
        load_into(model, str(file), strict=True)
    except RuntimeError as error:
        raise UserError(
            f"{file} does not fit the model: {error}. Its files were changed; train it again."
        ) from error


def _require_same_origin(folder: Path, cut: Cut, base: str) -> None:
    """The guard: same cut and same base, or no student."""
    try:
        stored_cut = Cut.load(folder / CUT_FILE)
        stored_base = json.loads((folder / "base.json").read_text(encoding="utf-8"))["base"]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{folder} does not say which cut and base model it belongs to ({error}). Only students that "
            f"sddx saved (with cut.json and base.json) can be loaded."
        ) from error
    if stored_cut != cut:
        raise UserError(
            f"the student in {folder} was trained with {_told(stored_cut)}, and {_told(cut)} were asked for. "
            f"Load it with its own cut."
        )
    if stored_base != base:
        raise UserError(
            f"the student in {folder} belongs to base model {stored_base}, and {base} was given. Load it "
            f"with the model it was trained from."
        )


def _told(cut: Cut) -> str:
    halves = [(cut.no_attention, "attention"), (cut.no_feedforward, "feed-forward")]
    lost = "".join(f", {name} of {list(numbers)}" for numbers, name in halves if numbers)
    return f"blocks {list(cut.removed)} of {cut.total}{lost} removed"


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
