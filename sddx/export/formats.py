"""What other runtimes will look for in a model folder, checked without them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sddx.errors import UserError
from sddx.models.anatomy import per_layer_lists
from sddx.models.structure import layout

# The names under which these runtimes know the architectures of `models.families`, as vLLM's registry of models
# (vllm/model_executor/models/registry.py) and the converter of llama.cpp (conversion/) have them. Read there, not
# tried. llama.cpp converts MPT by its older name, MPTForCausalLM, alone.
KNOWN = (
    "LlamaForCausalLM MistralForCausalLM MixtralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM "
    "Gemma2ForCausalLM Gemma3ForCausalLM Phi3ForCausalLM GPTNeoXForCausalLM"
).split()
HEADS = {"lm_head.weight", "embed_out.weight"}  # the latter is GPT-NeoX's
# llama.cpp does not read which blocks have a window: of these, every so many-th one has none (src/llama-model.cpp,
# set_swa_pattern; its converter writes no pattern).
PERIODS = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 6}
RUNTIMES = {"vLLM": {*KNOWN, "OPTForCausalLM", "MptForCausalLM"}, "llama.cpp": set(KNOWN)}


def inspect_model(folder: Path) -> dict[str, Any]:
    """The facts of a model folder that loaders rely on, and what each runtime is expected to make of it.

    Raises UserError where they contradict each other: the architecture is not transformers' own, depth, per-layer
    lists and the names of the weights disagree, the head's weights are not as the config says, or `tokenizer.json`
    is missing.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    text, names = config.get_text_config(), _tensor_names(folder)
    depth = text.num_hidden_layers
    architecture = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [None]
    )[0]
    numbers = _block_numbers(names, config)
    tied = bool(config.tie_word_embeddings)
    lists = {name: len(value) for name, value in vars(text).items() if name.endswith("layer_types") and value}
    checks = {
        f"{architecture} is no causal language model of transformers": architecture
        in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        f"num_hidden_layers is {depth} and the weights are of blocks {numbers}": numbers == list(range(depth)),
        f"per-layer lists have {lists} entries for {depth} blocks": set(lists.values()) <= {depth},
        f"tie_word_embeddings is {tied} and the head's weights say otherwise": tied != bool(HEADS & {*names}),
        "tokenizer.json is missing": (folder / "tokenizer.json").is_file(),
    }
    wrong = [problem for problem, holds in checks.items() if not holds]
    if wrong:
        raise UserError(f"{folder} is not what runtimes expect: {'; '.join(wrong)}.")
    facts = {"architecture": architecture, "blocks": depth, "tensors": len(names), "tied_embeddings": tied}
    return facts | {"per_layer_lists": sorted(per_layer_lists(text)), "runtimes": _expected(architecture, text)}


def runtimes(architecture: str) -> tuple[str, ...]:
    """The runtimes that know an architecture."""
    return tuple(name for name, architectures in RUNTIMES.items() if architecture in architectures)


def _expected(architecture: str, config: Any) -> dict[str, str]:
    expected = {name: f"does not know {architecture}" for name in RUNTIMES}
    expected |= dict.fromkeys(runtimes(architecture), "architecture known, files as expected; not yet run")
    if "llama.cpp" in runtimes(architecture) and (period := PERIODS.get(architecture)):
        if broken := out_of_pattern(config, period):
            expected["llama.cpp"] = (
                f"gives blocks {broken} another window than they have: it takes every {period}th block of "
                f"{architecture} for one that attends to all; pruning.keep_pattern=true keeps cuts to that"
            )
    return expected


def out_of_pattern(config: Any, period: int) -> list[int]:
    """The blocks that attend otherwise than a model whose every `period`-th block attends to all."""
    expected = [
        "sliding_attention" if (n + 1) % period else "full_attention" for n in range(len(config.layer_types))
    ]
    return [n for n, (kind, other) in enumerate(zip(config.layer_types, expected, strict=True)) if kind != other]


def _tensor_names(folder: Path) -> list[str]:
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names


def _block_numbers(names: list[str], config: Any) -> list[int]:
    """The numbers of the blocks that weights are named after, ascending."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # In files of a text model beside others the parts of its path stand in another order.
    path, numbered = sorted(layout(model).blocks.split(".")), re.compile(r"(.+?)\.(\d+)\.")
    matches = [match for name in names if (match := numbered.match(name))]
    return sorted({int(match[2]) for match in matches if sorted(match[1].split(".")) == path})
