"""convert: a model in one file becomes a folder like any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from sddx.data.encode import render, text_batches, token_ids
from sddx.evaluation.text import held_out
from sddx.gguf.model import Header, dequantise
from sddx.models.generation import neutral
from sddx.models.load import load_model, load_tokenizer
from sddx.records import Artifact
from sddx.runtime import Runtime

FOLDER = "model"
QUESTIONS = ("What is the capital of France?", "Name three colours.")
BEGINNINGS = ("The capital of France is", "Three colours are")
TEXT = (
    "A river begins as a small stream in the hills. Rain and melting snow feed it on its way down, other streams "
    "join it, and by the time it reaches the plain it is wide and slow. Towns grew on its banks, because boats "
    "could carry grain and timber to the sea, and because the mills needed its water."
)


def convert(out: Path, file: Artifact, *, runtime: Runtime) -> None:
    """Writes `model/`, the model of a GGUF file with its weights dequantised (sddx.gguf.model), and prints what
    shows whether it is sound: its answers to two prompts, and its loss on a plain text."""
    header = dequantise(file.path, out / FOLDER)
    if not runtime.quiet:
        print("\n".join(_shown(out / FOLDER, header)))


def _shown(folder: Path, header: Header) -> list[str]:
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype=header.dtype, attention="eager")
    name = header.metadata.get("general.name", "the model")
    loss = math.log(held_out(model, text_batches(tokenizer, [TEXT]))["perplexity"] or math.nan)
    asked = QUESTIONS if tokenizer.chat_template else BEGINNINGS
    return [
        f"Dequantised {name} from {header.quantization} to {header.dtype}: 'unpruned' is this model.",
        *(f"  {prompt} -> {_answer(model, tokenizer, prompt)!r}" for prompt in asked),
        f"  loss on a plain text: {loss:.2f} nats a token (a sound model has 2 to 4; chance is "
        f"{math.log(len(tokenizer)):.1f})",
    ]


def _answer(model: Any, tokenizer: Any, prompt: str) -> str:
    text = render(tokenizer, prompt) if tokenizer.chat_template else prompt
    ids = torch.tensor(token_ids(tokenizer, [text]))
    with neutral(model):
        written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
