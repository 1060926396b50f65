"""Students on disk: an adapter or full weights, tied to the cut and the base model that they belong to."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_model as load_into
from safetensors.torch import save_model

from sddx.compression import junction
from sddx.compression.junction import Attached
from sddx.compression.remove import apply_cut
from sddx.errors import UserError
from sddx.models.anatomy import Stack, blocks, is_adapted
from sddx.models.load import load_model, loading_device, placed
from sddx.parallel.distributed import is_joined
from sddx.records import Cut

OWN_WEIGHTS = "student.safetensors"


def save_student(model: Any, folder: Path, *, cut: Cut, base: str, attached: Attached | None = None) -> None:
    """Write the adapter (of a peft model) or all weights, with `cut.json` and `base.json` beside them.

    `base` is the content key of the unpruned model. A LoRA adapter loads onto any model with blocks of the
    same names, and lands on the wrong ones with one warning; so it carries what it belongs to. `attached` are
    the weights of patches, written too. A model that no stock loader knows (branches removed, patches as
    modules) is written under its parameters' own names, to be loaded into the base model after the same cut.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_adapted(model):
        # Left to itself, peft asks the hub whether the vocabulary was resized.
        model.save_pretrained(folder, save_embedding_layers=False)
    elif attached or not is_stock(cut):
        save_model(model, str(folder / OWN_WEIGHTS))
    else:
        model.save_pretrained(folder)
    if attached:
        junction.keep(attached, folder)
    write_origin(folder, cut, base)


def write_origin(folder: Path, cut: Cut, base: str) -> None:
    """Tie what a folder holds to its cut, and to its base model by the content key of that."""
    cut.save(folder / "cut.json")
    (folder / "base.json").write_text(json.dumps({"base": base}) + "\n", encoding="utf-8")


def is_stock(cut: Cut) -> bool:
    """Whether a model under this cut is one that transformers itself can build: whole blocks alone are gone."""
    return not (cut.no_attention or cut.no_feedforward)


@dataclass(frozen=True)
class Student:
    """A pruned or recovered model; the base model's whole blocks, with which its weights are the unpruned model
    (None where its weights are its own, or cannot be shared in shards); the weights of the patches inside it."""

    model: Any
    unpruned: Stack | None
    attached: Attached


def load_student(
    base_folder: Path,
    folder: Path | None,
    *,
    cut: Cut,
    base: str,
    patch: Path | None = None,
    dtype: str = "float32",
    attention: str = "sdpa",
    device: str = "cpu",
) -> Student:
    """The pruned model (`folder` None) or the recovered one, in eval mode and frozen; in a group of processes its
    blocks are in shards.

    `patch` is the folder of what stands in for the removed parts. An adapter is put onto the base model after
    the cut; full weights are loaded alone where a stock loader can. Raises UserError where what is stored
    belongs to another cut or another base, or where weights are missing or left over.
    """
    if folder is not None:
        _require_same_origin(folder, cut, base)
    how = {"dtype": dtype, "attention": attention, "device": loading_device(device)}
    student = _loaded(base_folder, folder, cut, patch, how)
    shared = student.unpruned
    if is_joined() and shared and has_twins(student.model, shared):
        shared = None
    placed(student.model, device, *(shared.blocks if shared else []))
    return replace(student, unpruned=shared)


def has_twins(model: Any, unpruned: Stack) -> bool:
    """Whether a block of a pruned model is a twin of the unpruned model's, with a branch less or a patch more: the
    two cannot share their shards."""
    return not set(blocks(model)) <= set(unpruned.blocks)


def _loaded(base_folder: Path, folder: Path | None, cut: Cut, patch: Path | None, how: dict[str, str]) -> Student:
    if folder is not None and (folder / "config.json").is_file():
        return Student(load_model(folder, **how).requires_grad_(False), None, {})
    model = load_model(base_folder, **how).requires_grad_(False)
    unpruned, attached = prune(model, cut, patch)
    if folder is not None and attached:
        junction.restore(attached, folder)
    if folder is None:
        return Student(model, unpruned, attached)
    if (folder / OWN_WEIGHTS).is_file():
        _restore(model, folder / OWN_WEIGHTS)
        return Student(model, None, attached)
    return Student(_adapt(model, folder).eval(), unpruned, attached)


def saved_and_loaded(
    student: Any, base_folder: Path, *, cut: Cut, base: str, patch: Path | None, attached: Attached, **how: str
) -> Any:
    """The student as it comes back from a folder: by its own way, or, where a stock loader can, by that."""
    with tempfile.TemporaryDirectory() as name:
        save_student(student, Path(name), cut=cut, base=base, attached=attached)
        return load_student(base_folder, Path(name), cut=cut, base=base, patch=patch, **how).model


def prune(model: Any, cut: Cut, patch: Path | None) -> tuple[Stack, Attached]:
    """Apply the cut and put in the patches of a folder, if any: the base model's whole blocks, and the patches'
    weights."""
    unpruned = apply_cut(model, cut)
    return unpruned, {} if patch is None else junction.attach(model, cut, junction.Junction.load(patch))


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
        stored_cut = Cut.load(folder / "cut.json")
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
