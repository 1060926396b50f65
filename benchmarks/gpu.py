"""What `sddx plan` says against what happens: `python benchmarks/gpu.py [--json FILE]`, on a GPU with 80 GB.

Random weights in the dimensions of an experiment's model, cut as it is: peak memory and time of training on rows of
2,048 tokens (goals: within 10 % and, after a probe, 25 % of the plan), the share that SFT reaches of the device's
products in bfloat16 (goal: 45 %), KD and SquareHead with the teacher in the same weights over SFT, and how much
faster 26 of 32 blocks read and write than 32, beside the ratio of parameters. Other dimensions, to try it:
`+rehearse=cpu`, or any override.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from transformers import AutoModelForCausalLM

from sddx.commands.bench import race
from sddx.compression.compressed import compress
from sddx.compression.remove import Removal, apply_cut
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
from sddx.students.teacher import SharedTeacher

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, LENGTH = 8, 2048
DEFAULT = ["+experiment=llama_26L", "trainer.batch_size=1", "trainer.accumulate=4"]


def configured(overrides: list[str]) -> dict[str, Any]:
    register()
    more = [f"max_length={LENGTH}", "trainer.budget=steps", f"trainer.steps={STEPS}", "validation=0"]
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
    objective = build(config["loss"])
    made = compress(random_model(estimate, cut=False), [Removal(estimate.cut)])
    made.model = build(config["tuning"])(made.model, 0)
    if not objective.needs_teacher:
        made.whole = {}
    teacher = SharedTeacher(made) if objective.needs_teacher else None
    runtime = Runtime(device=DEVICE, quiet=True)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        learned = (made.model, teacher, objective, made.cut, rows_of(config, estimate))
        found = build(config["trainer"])(*learned, [], 0, 0, Path(folder), runtime)
    # Of the loop alone: Lightning takes the model back to host memory afterwards.
    spent = found["attended_tokens"] / found["tokens_per_second"]
    return spent, torch.cuda.max_memory_reserved() if DEVICE == "cuda" else 0


def rows_of(config: dict[str, Any], estimate: Estimate) -> list[Encoded]:
    """Random rows for all steps, of which the second half is labelled."""
    count = STEPS * config["trainer"]["batch_size"] * config["trainer"]["accumulate"]
    length = min(LENGTH, estimate.shape.max_position_embeddings)
    ids = torch.randint(estimate.shape.vocab_size, (count, length)).tolist()
    half = length // 2
    return [Encoded(str(n), row, [-100] * half + row[half:], length - half) for n, row in enumerate(ids)]


def planned(config: dict[str, Any], device: Device) -> tuple[float, float, float]:
    """The seconds, bytes and operations that the plan says for the same."""
    estimate = estimated(config)
    length = min(LENGTH, estimate.shape.max_position_embeddings)
    estimate.rows = Rows(1, length / 2, length / 2)
    parts = [part for part in estimate.parts() if part.stage == "train"]
    spent = seconds(parts, device)
    assert spent is not None
    return spent["train"], peaks(estimate)["train"], sum(part.learning + part.reading for part in parts)


def products(width: int, repeats: int = 10) -> float:
    """Operations a second in products of square matrices in bfloat16, as large as the device likes them."""
    one, other = (torch.randn(width, width, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        one @ other
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return 2 * width**3 / min(spent)


def against_plan(config: dict[str, Any], estimate: Estimate) -> tuple[dict[str, float], float, float]:
    """SFT over its plan, and its seconds and bytes."""
    device = probed(device_of("cpu" if DEVICE == "cpu" else None), estimate.shape, config["model"]["dtype"], 20)
    print(f"{device}")
    expected, room, operations = planned(config, device)
    spent, held = train(config, estimate)
    share = operations / spent / products(8_192 if DEVICE == "cuda" else 2_048)
    print(f"training {STEPS} steps: {spent:.1f} s, planned {expected:.1f} s after a probe: {spent / expected:.2f}")
    print(f"of the products that the device reaches in bfloat16: {share:.1%}")
    figures = {"seconds_over_plan": spent / expected, "sft_share_of_peak": share}
    if held:
        print(f"peak memory: {held / 1e9:.2f} GB, planned {room / 1e9:.2f} GB: {held / room:.3f}")
        figures["memory_over_plan"] = held / room
    return figures, spent, held


def over_sft(loss: str, overrides: list[str], estimate: Estimate, spent: float, held: float) -> dict[str, float]:
    """What an arm with a teacher takes over SFT."""
    seconds, memory = train(configured([*overrides, f"loss={loss}"]), estimate)
    figures = {f"{loss}_time": seconds / spent, **({f"{loss}_memory": memory / held} if held else {})}
    print(", ".join(f"{name} over SFT: {ratio:.2f}" for name, ratio in figures.items()))
    return figures


def raced(estimate: Estimate) -> dict[str, Any]:
    """How the pruned model reads and writes, over the whole one."""
    context = min(LENGTH, estimate.shape.max_position_embeddings - 128)
    found = race(
        lambda: random_model(estimate, cut=False), lambda: random_model(estimate, cut=True),
        batch=1, context=context, new=64, repeats=3,
    )  # fmt: skip
    less = 1 - estimate.pruned.parameters / estimate.unpruned.parameters
    print(f"parameters less: {less:.2%}")
    for name, ratio in found["ratios"].items():
        print(f"{name}, pruned / unpruned: {ratio}")
    return {"parameters_less": less, **found["ratios"]}


def measured(overrides: list[str]) -> dict[str, Any]:
    """All figures by name."""
    config = configured([*overrides, "loss=sft"])
    estimate = estimated(config)
    figures, spent, held = against_plan(config, estimate)
    for loss in ("kd", "squarehead"):
        figures |= over_sft(loss, overrides, estimate, spent, held)
    return figures | raced(estimate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked, overrides = parser.parse_known_args()
    figures = measured(overrides)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
