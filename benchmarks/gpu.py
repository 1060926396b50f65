"""What `sddx.commands.plan` says against what happens: `python benchmarks/gpu.py`, on a GPU with 80 GB.

Random weights in the dimensions of an experiment's model, cut as it is: peak memory and time of training on rows of
2,048 tokens (goals: within 10 % and, after a probe, 25 % of the plan), and how much faster 26 of 32 blocks read and
write than 32, beside the ratio of parameters. Other dimensions, to try it: `+rehearse=cpu`, or any override.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from transformers import AutoModelForCausalLM

from sddx.commands.bench import race
from sddx.compression.remove import apply_cut
from sddx.config import CONF, register, resolve
from sddx.config.build import build
from sddx.data.encode import Encoded
from sddx.estimate.costs import Estimate, seconds
from sddx.estimate.devices import Device, device_of, probed
from sddx.estimate.peaks import peaks
from sddx.estimate.texts import Rows
from sddx.models.load import DTYPES
from sddx.runtime import Runtime
from sddx.stages.cost import estimated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, LENGTH = 8, 2048
DEFAULT = ["+experiment=llama_26L", "trainer.batch_size=1", "trainer.accumulate=4"]


def configured(overrides: list[str]) -> dict[str, Any]:
    register()
    more = [f"max_length={LENGTH}", "trainer.budget=steps", f"trainer.steps={STEPS}", "loss=sft", "validation=0"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[*DEFAULT, *more, *overrides], return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.job.num = 0
        cfg.hydra.runtime.output_dir = "unused"
        HydraConfig.instance().set_config(cfg)
        del cfg["hydra"]
    return resolve(cfg)


def random_model(estimate: Estimate, *, cut: bool) -> Any:
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(estimate.shape, dtype=DTYPES[estimate.model["dtype"]])
    if cut:
        apply_cut(model, estimate.cut)
    return model.eval().requires_grad_(False)


def train(config: dict[str, Any], estimate: Estimate) -> tuple[float, float]:
    """Seconds of all steps, and the peak bytes of memory (0 on a CPU)."""
    student = build(config["tuning"])(random_model(estimate, cut=True), 0)
    per_step = config["trainer"]["batch_size"] * config["trainer"]["accumulate"]
    length = min(LENGTH, estimate.shape.max_position_embeddings)
    ids = torch.randint(estimate.shape.vocab_size, (STEPS * per_step, length)).tolist()
    half = length // 2
    rows = [Encoded(str(n), row, [-100] * half + row[half:], length - half) for n, row in enumerate(ids)]
    runtime = Runtime(device=DEVICE, quiet=True)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        given = (student, None, build(config["loss"]), estimate.cut, rows, [], 0, 0, Path(folder), runtime)
        found = build(config["trainer"])(*given)
    # Of the loop alone: Lightning takes the model back to host memory afterwards.
    spent = found["attended_tokens"] / found["tokens_per_second"]
    return spent, torch.cuda.max_memory_reserved() if DEVICE == "cuda" else 0


def planned(config: dict[str, Any], device: Device) -> tuple[float, float]:
    """The seconds and bytes that the plan says for the same."""
    estimate = estimated(config)
    length = min(LENGTH, estimate.shape.max_position_embeddings)
    estimate.rows = Rows(1, length / 2, length / 2)
    spent = seconds([part for part in estimate.parts() if part.stage == "train"], device)
    assert spent is not None
    return spent["train"], peaks(estimate)["train"]


def main(overrides: list[str]) -> None:
    config = configured(overrides)
    estimate = estimated(config)
    device = probed(device_of("cpu" if DEVICE == "cpu" else None), estimate.shape, config["model"]["dtype"], 20)
    print(f"{device}")
    expected, room = planned(config, device)
    spent, held = train(config, estimate)
    print(f"training {STEPS} steps: {spent:.1f} s, planned {expected:.1f} s after a probe: {spent / expected:.2f}")
    if held:
        print(f"peak memory: {held / 1e9:.2f} GB, planned {room / 1e9:.2f} GB: {held / room:.3f}")
    context = min(LENGTH, estimate.shape.max_position_embeddings - 128)
    found = race(
        lambda: random_model(estimate, cut=False), lambda: random_model(estimate, cut=True),
        batch=1, context=context, new=64, repeats=3,
    )  # fmt: skip
    print(f"parameters less: {1 - estimate.pruned.parameters / estimate.unpruned.parameters:.2%}")
    for name, ratio in found["ratios"].items():
        print(f"{name}, pruned / unpruned: {ratio}")


if __name__ == "__main__":
    main(sys.argv[1:])
