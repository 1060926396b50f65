"""What the weights in a model's folder were dequantised from. Importing this module is cheap."""

from __future__ import annotations

import json
from pathlib import Path

# The types of tensors that hold plain numbers, and the dtype that holds these exactly.
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ORIGIN = "gguf.json"  # in a model's folder


def origin(folder: Path) -> str | None:
    """The quantization that the weights in a model's folder were dequantised from; None for all other models."""
    file = folder / ORIGIN
    quantization = json.loads(file.read_text(encoding="utf-8"))["quantization"] if file.is_file() else None
    return None if quantization in PLAIN else quantization
