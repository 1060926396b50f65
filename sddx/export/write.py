"""The folder of an exported model: refused where no stock loader could read it, renamed into place when proven."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from sddx.errors import UserError
from sddx.export import card, proof
from sddx.export.formats import inspect_model
from sddx.models.load import DTYPES, decides, find_device, load_model
from sddx.store import Store
from sddx.students.plain import ADAPTER, write_apart, write_merged
from sddx.students.recovered import Recovered, find_own


def export(
    path: str | Path,
    to: Path,
    *,
    adapter: str = "merged",
    dtype: str | None = None,
    device: str = "cpu",
    evaluated: bool = False,
) -> dict[str, Any]:
    """Write the recovered model of a run (its `summary.json`) into the folder `to`, and return the proof that what
    stock loaders read from there is the model that `sddx.load` gives.

    `adapter` merged: one folder; apart: `to`/base and `to`/adapter. `evaluated`: the run's evaluation is repeated
    on what was written. The folder appears complete and proven, or not at all. Raises UserError where `to` holds
    something, where no stock loader can read such a model, where the run or its base model is not what it was,
    and where the proof fails.
    """
    run = find_own(path)
    _require_exportable(run, to, adapter, dtype)
    device = find_device(device)
    if evaluated:
        proof.require_evaluation(run)
    disable_progress_bar()
    loading = run.loading(dtype, device)
    with _appearing(to) as folder:
        prompts = proof.prompts(run)
        expected = _write_weights(run, folder, to, adapter, loading, prompts)
        model = load_exported(folder, adapter, loading)
        record = proof.prove(expected, model, prompts, adapter=adapter, loading=loading)
        record["formats"] = inspect_model(model_folder(folder, adapter))
        if evaluated:
            record["evaluation"] = proof.flipped_items(run, model, device)
        (folder / "proof.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / "sddx.json").write_text(json.dumps(card.record(run), indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card.text(run, record), encoding="utf-8")
    return record


def model_folder(folder: Path, adapter: str) -> Path:
    """Where in an export the model without its adapter lies."""
    return folder / "base" if adapter == "apart" else folder


def load_exported(folder: Path, adapter: str, loading: dict[str, str]) -> Any:
    """The model as transformers, and peft where the adapter is apart, read it; nothing of ours takes part."""
    model = load_model(model_folder(folder, adapter), **loading)
    if adapter == "merged":
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder / "adapter")).to(loading["device"]).eval()


def _require_exportable(run: Recovered, to: Path, adapter: str, dtype: str | None) -> None:
    """Raises UserError for all that can be known before a model is loaded."""
    _require_empty(to)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not known. Use one of {', '.join(DTYPES)}.")
    if adapter == "apart" and not (run.trained and (run.trained / ADAPTER).is_file()):
        raise UserError("this run has no adapter: all weights were trained, or none. Use adapter=merged.")
    require_stock(run)
    _require_room(run, to, dtype or run.summary["dtype"])
    base = Store(Path(run.summary["store"])).source("model", run.base, decides)
    if base.key != run.summary["artifacts"]["model"]:
        raise UserError(
            f"the base model in {run.base} is not the one that the run used: its files were changed. Put them "
            "back, or run again."
        )


def _require_empty(to: Path) -> None:
    try:
        taken = to.exists() and (not to.is_dir() or any(to.iterdir()))
    except OSError as error:
        raise UserError(f"{to} cannot be used ({error.strerror}). Give another folder: to=...") from None
    if taken:
        raise UserError(f"{to} exists and is not empty. Give another folder: to=..., nothing is overwritten.")


def _require_room(run: Recovered, to: Path, dtype: str) -> None:
    existing = next(folder for folder in (to, *to.parents) if folder.is_dir())
    needed, free = card.parameters(run.summary) * DTYPES[dtype].itemsize, shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"The weights take {needed / 1e9:.1f} GB, and {existing} has {free / 1e9:.1f} GB free. Make room, or "
            "give a folder on another disk: to=..."
        )


def require_stock(run: Recovered) -> None:
    """Raises UserError where the model is none that transformers can build from a config, with what loads it."""
    loads = (
        f"sddx.load({str(run.folder / 'summary.json')!r}) loads it as it is; transformers, vLLM and llama.cpp "
        "build whole blocks of their own kinds alone, so there is nothing to export for them."
    )
    removal, *others = run.done
    if not removal.is_stock:
        raise UserError(
            f"this model lacks branches of blocks ({run.cut.name}: attention A, feed-forward F). {loads}"
        )
    if not all(each.is_stock for each in others):
        raise UserError(
            f"a patch ({run.summary['choices']['patch']}) stands in this model as a module of its own. {loads} "
            "Patches that can be exported: pruning/patch=block, and linear_ffn or mean with patch.fold=true."
        )


@contextmanager
def _appearing(to: Path) -> Iterator[Path]:
    """A folder beside `to` that takes its place when all went well, and is gone otherwise."""
    folder = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{to} cannot be written ({error.strerror}). Give another folder: to=...") from error
    try:
        yield folder
        _rename(folder, to)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, to: Path) -> None:
    try:
        folder.rename(to)  # onto an empty folder at most
    except OSError as error:
        raise UserError(f"{to} was filled meanwhile ({error.strerror}). Give another folder: to=...") from error


def _write_weights(
    run: Recovered, folder: Path, to: Path, adapter: str, loading: dict[str, str], prompts: list[list[int]]
) -> list[Any]:
    """Write model and tokenizer, and return the logits that they must give. The model is freed on leaving, so that
    one is held at a time."""
    student = run.student(loading["dtype"], loading["device"]).model
    expected = proof.logits(student, prompts)
    if adapter == "apart":
        assert run.trained is not None  # else it was refused
        write_apart(student, run.base, run.trained, folder, place=to)
    else:
        write_merged(student, run.base, folder)
    return expected
