"""How fast a device is: as its maker states, or as it is measured on the spot."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from sddx.errors import UserError
from sddx.estimate.skeleton import size_of
from sddx.models.anatomy import decoder
from sddx.models.load import DTYPES

# What this code reaches of a stated peak. Ours, not yet measured on a GPU: a probe replaces them.
READING, LEARNING, DECODING = 0.40, 0.35, 0.60
PROBED = 512  # tokens of the text on which speed is measured
STEPS = 16  # of decoding behind it, from one copy of what the text left in the cache
LAUNCH = 0.9e-3  # seconds a block and step that decoding cannot fall below in eager transformers; ours too


@dataclass(frozen=True)
class Device:
    """Memory in bytes; FLOPs a second while reading text and while learning (forward and backward), bytes a second
    while decoding, and the least seconds a block takes in a step of decoding. None: not known."""

    name: str
    memory: float
    reading: float | None
    learning: float | None
    bandwidth: float | None
    launch: float


def _stated(name: str, gigabytes: float, teraflops: float, terabytes: float) -> Device:
    flops = teraflops * 1e12
    return Device(name, gigabytes * 1e9, READING * flops, LEARNING * flops, DECODING * terabytes * 1e12, LAUNCH)


# Memory, dense bf16 TFLOP/s and TB/s of memory, from NVIDIA's data sheets.
DEVICES = {
    "h200": _stated("H200 SXM", 141, 989, 4.8),
    "h100": _stated("H100 SXM", 80, 989, 3.35),
    "a100": _stated("A100 SXM 80 GB", 80, 312, 2.04),
    "l40s": _stated("L40S", 48, 362, 0.864),
    "rtx4090": _stated("RTX 4090", 24, 165, 1.01),
}


def device_of(name: str | None) -> Device:
    """The device of this name; without one the GPU of this machine, or an H100 where it has none. `cpu` is this
    machine's CPU, whose speed only a probe can tell. Raises UserError for an unknown name."""
    if name == "cpu":
        return Device("this machine's CPU", psutil.virtual_memory().total, None, None, None, 0.0)
    if name is None and torch.cuda.is_available():
        return _here()
    if (name := name or "h100") not in DEVICES:
        raise UserError(
            f"gpu={name!r} is not known. Use {', '.join(DEVICES)}, cpu, or gpu=null for this machine's."
        )
    return DEVICES[name]


def this_machine(name: str | None) -> Device:
    """What a probe measures: this machine's GPU, called `name` where it is in no table, or else its CPU.
    Raises UserError where another device is named."""
    if not torch.cuda.is_available():
        if name not in (None, "cpu"):
            raise UserError(
                f"probe measures this machine, which has no GPU, and gpu={name}. Leave out probe to plan for that "
                "GPU by its maker's figures, or gpu to measure the CPU."
            )
        return device_of("cpu")
    card = torch.cuda.get_device_name()
    known = _known(card)
    if name == "cpu" or (name is not None and known not in (None, name)):
        gpu = known or card
        raise UserError(f"probe measures this machine, whose GPU is an {gpu}, and gpu={name}. Leave out one.")
    return _here(name)


def _here(like: str | None = None) -> Device:
    """This machine's GPU, with the memory that it has. Raises UserError where it is in no table and `like` none."""
    card = torch.cuda.get_device_name()
    if (name := _known(card) or like) is None:
        raise UserError(f"This GPU ({card}) is in no table. Name one that is like it, gpu=a100, and use probe=60s.")
    return replace(DEVICES[name], name=card, memory=torch.cuda.get_device_properties(0).total_memory)


def _known(card: str) -> str | None:
    """The name in DEVICES of a GPU that calls itself `card`; None for one that is in no table, as the slower cards
    of a kind for a PCIe slot (PCIe, NVL) or a laptop."""
    words = [word.split("-")[0] for word in card.lower().replace("rtx ", "rtx").split()]
    slower = any(mark in card.lower() for mark in ("pcie", "nvl", "laptop", "max-q"))
    return None if slower else next((name for name in DEVICES if name in words), None)


def probed(device: Device, config: Any, dtype: str, seconds: float) -> Device:
    """The same device at the speed measured here on two blocks of this model's dimensions, with random weights:
    reading, learning with LoRA, and decoding, a third of `seconds` each."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    model = _two_blocks(config, dtype, where)
    ids, share = torch.zeros(1, PROBED, dtype=torch.long, device=where), seconds / 3
    flops = PROBED * size_of(model).prefill(PROBED)
    mask = torch.ones_like(ids)
    body = decoder(model)

    @torch.no_grad()
    def read() -> None:
        body(input_ids=ids, attention_mask=mask, use_cache=False)

    reading = flops / _duration(read, share, where)
    held = sum(weight.numel() * weight.element_size() for weight in body.parameters())
    step = _duration(_decoder(body, ids), share, where) / STEPS
    learning = 2 * flops / _duration(_learner(model, ids, mask), share, where)
    return replace(
        device, name=f"{device.name}, probed", reading=reading, learning=learning, bandwidth=held / step, launch=0.0
    )


def _two_blocks(config: Any, dtype: str, where: str) -> nn.Module:
    """Two blocks of these dimensions, one of each kind where there are several, and next to no vocabulary, so that
    they are all there is."""
    from transformers import AutoModelForCausalLM

    small = deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 2, 8
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, 0)
    if getattr(small, "layer_types", None):
        kinds = list(dict.fromkeys(small.layer_types))[:2]
        small.layer_types = (2 * kinds)[:2]
    with torch.device(where):
        return AutoModelForCausalLM.from_config(small, dtype=DTYPES[dtype]).eval().requires_grad_(False)


def _decoder(body: Any, ids: torch.Tensor) -> Callable[[], None]:
    """A few steps after the text, each time from there: not every cache can forget what it took in."""
    with torch.no_grad():
        read = body(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def steps() -> None:
        cache = deepcopy(read)
        for _ in range(STEPS):
            body(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

    return steps


def _learner(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Callable[[], None]:
    from sddx.training.tuning import lora

    student: Any = lora(model, 0)

    def step() -> None:
        decoder(student)(input_ids=ids, attention_mask=mask, use_cache=False)[0].float().sum().backward()

    return step


def _duration(work: Callable[[], None], seconds: float, where: str) -> float:
    """Seconds a call, the first one apart, over about so many seconds."""
    work()
    _wait(where)
    start, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - start < seconds:
        work()
        _wait(where)
        calls += 1
    return (time.perf_counter() - start) / calls


def _wait(where: str) -> None:
    if where == "cuda":
        torch.cuda.synchronize()
