"""A model as a plain Hugging Face folder: the files of its base model, with what the cut changed; an adapter worked
into them, or in a folder of its own."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from sddx.models.anatomy import is_adapted
from sddx.models.load import TERMS

SHARD = "5GB"
ADAPTER = "adapter_model.safetensors"
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "*.model",
    "chat_template*",
)  # fmt: skip


def write_merged(model: Any, base: Path, folder: Path) -> None:
    """Write the model (an adapter worked into its weights) and its tokenizer in the files that the base model came
    in, as transformers, lm-eval and vLLM load them."""
    if is_adapted(model):
        model = model.merge_and_unload()
    if (base / "generation_config.json").is_file():
        model.generation_config = GenerationConfig()  # what came with the base is copied, sound or not
    model.save_pretrained(folder, max_shard_size=SHARD)
    own_config(base, folder)
    if not (folder / "tokenizer.json").exists():
        _copy(base, folder, (*TOKENIZER, "generation_config.json", *TERMS))
    if not (folder / "tokenizer.json").exists():  # written by every fast tokenizer, and asked for by runtimes
        AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(folder)


def write_apart(model: Any, base: Path, trained: Path, folder: Path, *, place: Path | None = None) -> None:
    """Write a model with an adapter in two folders: `folder`/base, the model without it (`write_merged`), and
    `folder`/adapter, in peft's form, as it was `trained`: its block numbers are those of the pruned model already.
    `place`: where `folder` will be."""
    adapter = folder / "adapter"
    adapter.mkdir()
    shutil.copyfile(trained / ADAPTER, adapter / ADAPTER)
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": str((place or folder) / "base"), "revision": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_merged(model.unload(), base, folder / "base")


def _copy(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    for path in source.iterdir():
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns):
            shutil.copyfile(path, folder / path.name)


def own_config(base: Path, folder: Path) -> None:
    """Write `config.json` as the base model's own, with what the cut changed and no more.

    transformers 5 writes some settings in a new place (`rope_parameters`), where older readers do not look for
    them and take a default without a word. Where the result is not read as what was saved, that stays.
    """
    path, old, new = folder / "config.json", _settings(base), _settings(folder)
    kept, saved = (json.loads((place / "config.json").read_text(encoding="utf-8")) for place in (base, folder))
    changed = {name: value for name, value in new.items() if name not in old or old[name] != value}
    dtype = changed.pop("dtype", new.get("dtype"))
    kept |= changed | {"torch_dtype" if "torch_dtype" in kept else "dtype": dtype}
    _write_config(path, kept)
    if _settings(folder) != new:
        _write_config(path, saved)


def _write_config(path: Path, fields: dict[str, Any]) -> None:
    fields.pop("auto_map", None)  # names code that is not exported
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _settings(folder: Path) -> dict[str, Any]:
    """A config as transformers reads it, without what it says about its file."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    fields = json.loads(config.to_json_string(use_diff=False))
    about_the_file = ("_name_or_path", "transformers_version", "auto_map")
    return {name: value for name, value in fields.items() if name not in about_the_file}
