"""A model in a GGUF file, dequantised into a folder like any other.

Weights are read by transformers, for every architecture that it knows. The tokenizer is built from the file's own
tokens (sddx.gguf.tokenizer), because what transformers makes of it is not always the file's: an
end token that is the begin token, merges and the begin token that are lost.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from sddx.errors import UserError
from sddx.gguf.origin import ORIGIN, PLAIN
from sddx.gguf.tokenizer import require_same, tokenizer_of
from sddx.models.load import DTYPES, load_tokenizer, said


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself: its metadata by name, and how many weights each type of tensor holds."""

    metadata: dict[str, Any]
    weights: dict[str, int]

    @property
    def quantization(self) -> str:
        """What the file says that it is (Q4_K_M), or the type of most of its weights."""
        from gguf import LlamaFileType

        with suppress(KeyError, ValueError):
            name = LlamaFileType(self.metadata["general.file_type"]).name
            return name.removeprefix("MOSTLY_").removeprefix("ALL_")
        return self._most

    @property
    def dtype(self) -> str:
        """What the weights are kept in: their own dtype where they are plain numbers, else bfloat16."""
        return PLAIN.get(self._most, "bfloat16")

    @property
    def _most(self) -> str:
        return max(self.weights, key=lambda kind: self.weights[kind])


def require_readable(file: Path) -> None:
    """Raises UserError where there is no such file, where it is no GGUF, or where the package that reads it is not
    installed."""
    if not file.is_file():
        raise UserError(f"There is no file {file}. Give model.path a GGUF file, a model's folder or a hub id.")
    if find_spec("gguf") is None:
        raise UserError(f"{file} needs the package gguf: pip install 'sddx[gguf]'.")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError(f"{file} is no GGUF file: it does not begin with GGUF. Fetch it again.")


def read(file: Path) -> Header:
    """The metadata of a file, and what its tensors are. Raises UserError as `require_readable` does, for a file
    that ends too early, and for one that holds no weights."""
    require_readable(file)
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        weights = Counter[str]()
        for tensor in reader.tensors:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
    except Exception as error:  # numpy, struct and the reader itself each have their own
        raise UserError(f"{file} cannot be read as GGUF: {said(error)}. Fetch it again.") from error
    if not weights:
        raise UserError(f"{file} holds a vocabulary and no weights. Give the GGUF file of the model itself.")
    return Header(metadata, dict(weights))


def dequantise(file: Path, folder: Path) -> Header:
    """Write the model of a GGUF file into a folder: safetensors, config, generation config, tokenizer, chat
    template, and in `gguf.json` what the weights were. Returns the file's header.

    The tokenizer is read back and proven to be the file's. Raises UserError for an architecture that transformers
    does not read, weights that are missing, and a tokenizer that cannot be made or is not the file's.
    """
    header = read(file)
    tokenizer = tokenizer_of(header.metadata)
    model = _model(file, header.dtype)
    model.generation_config = GenerationConfig(**_tokens(header.metadata, tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    require_same(load_tokenizer(folder), header.metadata)
    was = {"quantization": header.quantization, "weights": header.weights}
    (folder / ORIGIN).write_text(json.dumps(was) + "\n", encoding="utf-8")
    return header


def _model(file: Path, dtype: str) -> Any:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,  # the scales are applied in full precision
            local_files_only=True,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an architecture that is not known, a field that is not there, each of its own kind
        raise UserError(f"transformers does not read the model in {file}: {said(error)}.") from error
    if lost := sorted(map(str, report["missing_keys"])):
        raise UserError(f"{file} lacks {len(lost)} weights of its architecture: {', '.join(lost[:3])}.")
    # transformers saves no model that says it is quantised, and this one is so no longer.
    model.hf_quantizer = None
    del model.config.quantization_config
    return model.to(DTYPES[dtype])


def _tokens(metadata: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Where the model's answers begin and end: by the file, and by the chat template where there is one."""
    ends = {tokenizer.eos_token_id, metadata.get("tokenizer.ggml.eot_token_id")} - {None}
    if tokenizer.chat_template:
        from sddx.data.encode import ending

        ends.add(tokenizer.convert_tokens_to_ids(ending(tokenizer).token))
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted(ends),
        "pad_token_id": tokenizer.pad_token_id,
    }
