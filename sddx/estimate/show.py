"""An estimate as tables, and the refusal of what costs more than it may."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from rich.console import Console
from rich.table import Table

from sddx.errors import UserError
from sddx.estimate.costs import Estimate, Part, distinct, seconds
from sddx.estimate.devices import DEVICES, Device, device_of, probed, this_machine
from sddx.estimate.peaks import CONTEXT, fits, in_shards, peaks
from sddx.models.load import DTYPES
from sddx.store import default_root
from sddx.store.digest import digest
from sddx.sweep.plan import clock
from sddx.training.tuning import lora, qlora

# Settings on which memory hangs, beside what is removed.
HELD = (
    "model", "calibration", "metrics", "generation", "tuning", "max_length", "teacher", "teacher_cache",
    "evaluation", "text", "speculation", "drift", "merging",
)  # fmt: skip
HELD_BY_TRAINER = (
    "batch_size", "accumulate", "gradient_checkpointing", "precision", "strategy", "devices", "head_chunk",
)  # fmt: skip
FSDP = "trainer.strategy=fsdp over several devices"
LEAST = (1, 2)  # rows at once that a batch size can be lowered to; of one, evaluation shares no beginnings


def device_for(config: Mapping[str, Any], estimate: Estimate) -> Device:
    """The device that a configuration is planned for (`gpu`), at its stated speed; with a `probe` this machine's,
    at the speed that is measured."""
    if config["probe"] is None:
        return device_of(config["gpu"])
    return probed(this_machine(config["gpu"]), estimate.shape, estimate.model["dtype"], _seconds(config["probe"]))


def _seconds(probe: Any) -> float:
    """What a probe may take. Raises UserError for what is no duration up to an hour."""
    try:
        seconds = float(str(probe).removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise UserError(f"probe={probe!r} is no duration up to an hour. Give seconds, as in probe=60s.")
    return seconds


def require_device(config: Mapping[str, Any]) -> None:
    """Raises UserError for a device to plan for that is not known, and a probe that is no duration."""
    if config["gpu"] is not None:
        device_of(config["gpu"])
    if config["probe"] is not None:
        _seconds(config["probe"])


def hours(estimates: Sequence[Estimate], device: Device) -> float | None:
    """Hours on one such device, work that several runs share counted once; None where its speed is not known."""
    spent = seconds([part for each in estimates for part in each.parts()], device)
    return None if spent is None else sum(spent.values()) / 3600


def require(configs: Sequence[Mapping[str, Any]], estimated: Callable[[Mapping[str, Any]], Estimate]) -> None:
    """Raises UserError where these runs, as they are `estimated`, take more hours together than budget.gpu_hours,
    where one needs more memory than this machine's GPU has (with what would fit), or where the store's disk cannot
    hold what one writes. Asked of none of these, nothing is estimated."""
    first = configs[0]
    limited = first["budget"]["gpu_hours"] is not None
    on_gpu = first["device"] != "cpu" and torch.cuda.is_available()
    if not (limited or on_gpu or any(map(_may_write_weights, configs))):
        return
    estimates = [estimated(config) for config in configs]
    for estimate in estimates:
        if _may_write_weights(estimate.config) and (estimate.by_vllm or estimate.is_full):
            _within_disk(estimate)
    if limited:
        _within_budget(first, hours(estimates, device_for(first, estimates[0])))
    if on_gpu:
        _within_memory(heaviest(estimates), torch.cuda.get_device_properties(0).total_memory)


def _within_budget(config: Mapping[str, Any], needed: float | None) -> None:
    limit = config["budget"]["gpu_hours"]
    if limit is not None and needed is None:
        raise UserError(
            f"budget.gpu_hours={limit} cannot be kept: the speed of a CPU is not known. Measure it with "
            "probe=60s, name a GPU with gpu=..., or leave the budget out."
        )
    if limit is not None and needed is not None and needed > limit:
        raise UserError(
            f"This takes about {needed:.1f} GPU-hours and budget.gpu_hours={limit}. Raise the budget, or take "
            "fewer rows (dataset.size), fewer items (evaluation=quick) or fewer runs."
        )


def _may_write_weights(config: Mapping[str, Any]) -> bool:
    """Whether all of a model's weights may be written: for vLLM, or by a tuning that is not known to make an
    adapter, which is small; of any other, only the model tells."""
    if config["stages"]:
        return False
    adapts = get_object(config["tuning"]["_target_"]) in (lora, qlora)
    return config["evaluation"].get("backend") == "vllm" or bool(config["loss"]["terms"] and not adapts)


def _within_disk(estimate: Estimate) -> None:
    disk = estimate.disk()
    needed = max(disk.get("while training", 0), disk.get("student", 0) + disk.get("while evaluating", 0))
    root = Path(estimate.config["store"] or default_root()).expanduser().absolute()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise UserError(
            f"This run needs {needed / 1e9:.1f} GB in the store {root}, where {free / 1e9:.1f} GB are free. Make "
            "room (sddx store gc), give another store=/folder, or write fewer weights (tuning=lora, "
            "evaluation.backend=hf)."
        )


def _within_memory(estimates: Sequence[Estimate], room: float) -> None:
    """Every stage that does not fit is told, each by the run that needs most for it."""
    largest: dict[str, tuple[float, Estimate]] = {}
    for estimate in estimates:
        for stage, held in peaks(estimate).items():
            if held + CONTEXT > max(room, largest.get(stage, (0.0, None))[0]):
                largest[stage] = held + CONTEXT, estimate
    if largest:
        raise UserError(
            *(
                f"The stage {stage} needs about {needed / 1e9:.0f} GB, and this GPU has {room / 1e9:.0f}. "
                f"{_way_out(estimate, stage, room)}"
                for stage, (needed, estimate) in largest.items()
            )
        )


def _way_out(estimate: Estimate, stage: str, room: float) -> str:
    cost, larger = estimate.stages[stage], "use a GPU with more memory"
    shards = [] if in_shards(estimate) else [FSDP]
    if hasattr(cost, "remedies"):
        ways = [*cost.remedies(estimate, room), *shards]
        return f"Each of these would do: {'; '.join(ways)}." if ways else f"To make it fit, {larger}."
    ways = [f"lower {cost.SMALLER}"] if hasattr(cost, "SMALLER") and _fits_smaller(estimate, cost, room) else []
    ways += ["set model.dtype=bfloat16"] if DTYPES[estimate.model["dtype"]].itemsize > 2 else []
    ways += [f"take {way}" for way in shards]
    return f"To make it fit, {', '.join([*ways, larger])}."


def _fits_smaller(estimate: Estimate, cost: Any, room: float) -> bool:
    """Whether a stage fits with the least of what it does at once."""
    group, *inner, setting = cost.SMALLER.split(".")
    changed = {group: deepcopy(estimate.config[group])}
    node = changed[group]
    for name in inner:
        node = node[name]
    if setting not in node or room < estimate.unpruned.weight_bytes:
        return False
    for rows in LEAST:
        node[setting] = rows
        if fits(cost.peak(estimate.varied(**changed)), room):
            return True
    return False


def heaviest(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Of the runs that hold the same things in memory, the one that is pruned least."""
    largest: dict[Any, Estimate] = {}
    for each in sorted(estimates, key=lambda estimate: estimate.pruned.parameters):
        config, pruning, trainer = each.config, each.config["pruning"], each.config["trainer"]
        about = [config.get(name) for name in HELD] + [trainer.get(name) for name in HELD_BY_TRAINER]
        about += [
            pruning.get("metric"),
            pruning["patch"],
            each.units,
            each.trains,
            each.rewrites,
            each.needs_teacher,
            config["loss"].get("rollouts"),
        ]
        about += [config["dataset"].get(name) for name in ("name", "path", "skill")]
        largest[digest(about)] = each
    return list(largest.values())


def show(estimates: Sequence[Estimate], config: Mapping[str, Any], console: Console) -> None:
    """Print what runs cost: the models before and after, the stages with tokens, memory and time, disk, and what
    fits where. Raises UserError where it is more than the budget allows."""
    device = device_for(config, estimates[0])
    for estimate in {(e.model["path"], e.cut.name): e for e in estimates}.values():
        console.print(_model(estimate, config["context"]))
    candidates = [(peaks(estimate), estimate) for estimate in heaviest(estimates)]
    held: dict[str, float] = {}
    for sizes, _ in candidates:
        held |= {stage: max(size, held.get(stage, 0)) for stage, size in sizes.items()}
    parts = [part for each in estimates for part in each.parts()]
    spent = seconds(parts, device)
    console.print(_stages(distinct(parts), spent, held, device, len(estimates)))
    largest = max(candidates, key=lambda pair: max(pair[0].values()))[1]
    for line in _notes(largest, held, device):
        console.print(line, highlight=False, soft_wrap=True)
    _within_budget(config, None if spent is None else sum(spent.values()) / 3600)


def _model(estimate: Estimate, context: int) -> Table:
    before, after = estimate.unpruned, estimate.pruned
    table = Table(
        title=f"{estimate.model['path']}, {before.blocks} blocks to {estimate.cut.name}", title_justify="left"
    )
    for name in ("", "unpruned", "pruned", "less"):
        table.add_column(name, justify="right" if name else "left")
    rows = {
        "parameters": (before.parameters, after.parameters, 1, 0),
        f"GFLOPs a token, prefill at {context:,}": (before.prefill(context), after.prefill(context), 1e9, 3),
        f"GFLOPs a token, decode at {context:,}": (before.decode(context), after.decode(context), 1e9, 3),
        "cache, bytes a token": (before.cache_bytes, after.cache_bytes, 1, 0),
        "weights, GB": (before.weight_bytes, after.weight_bytes, 1e9, 3),
    }
    for name, (old, new, unit, digits) in rows.items():
        table.add_row(name, *(f"{size / unit:,.{digits}f}" for size in (old, new)), f"{1 - new / old:.2%}")
    return table


def _stages(
    once: Sequence[Part],
    spent: Mapping[str, float] | None,
    held: Mapping[str, float],
    device: Device,
    runs: int,
) -> Table:
    title = f"{runs} run{'s' if runs > 1 else ''} on {device.name}" + (", shared work once" if runs > 1 else "")
    table = Table(title=title, title_justify="left")
    for name in ("stage", "times", "tokens read", "written", "trained", "peak GB", "time"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in dict.fromkeys(part.stage for part in once):
        here = [part for part in once if part.stage == stage]
        tokens = [sum(part.tokens.get(kind, 0) for part in here) for kind in ("read", "written", "trained")]
        duration = "?" if spent is None else clock(spent[stage])
        memory = f"{held[stage.split()[0]] / 1e9:.1f}" if stage.split()[0] in held else ""
        table.add_row(stage, str(len(here)), *(_count(value) for value in tokens), memory, duration)
    total = "?" if spent is None else clock(sum(spent.values()))
    table.add_section()
    table.add_row("all", "", "", "", "", f"{max(held.values()) / 1e9:.1f}", total)
    return table


def _count(tokens: float) -> str:
    return f"{tokens / 1e6:,.2f} M" if tokens else ""


def _of_a_run(estimate: Estimate) -> list[str]:
    disk = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in estimate.disk().items())
    notes = [f"Disk: {disk}."]
    if estimate.trains:
        rows = estimate.rows
        notes = [
            f"Trained parameters: {estimate.trained:,}. {notes[0]}",
            estimate.adapter,
            f"Rows: {rows.count:,}; on average {rows.prompt:.0f} tokens a prompt, {rows.answer:.0f} a reference.",
        ]
        if estimate.assumed:
            name = estimate.config["dataset"]["name"]
            notes.append(f"The rows of {name} are not known here: taken to be GSM8K's.")
        looks = estimate.needs_teacher or estimate.config["teacher_cache"]
        if looks and estimate.config["teacher"] and estimate.teacher is estimate.unpruned:
            notes.append(f"The teacher {estimate.config['teacher']} is taken to be as large as the unpruned model.")
    if estimate.unknown:
        notes.append(f"Not counted, because their size is not known here: {', '.join(estimate.unknown)}.")
    if estimate.by_vllm:
        notes.append("Hours of evaluation are those of Hugging Face: how much faster vLLM is, is not known here.")
    return notes


def _notes(estimate: Estimate, held: Mapping[str, float], device: Device) -> list[str]:
    needed = max(held.values()) + CONTEXT
    fits = [each.name for each in DEVICES.values() if each.memory >= needed] or ["none of those known here"]
    notes = [
        *([] if estimate.config["stages"] else _of_a_run(estimate)),
        f"One device holds every stage: {', '.join(fits)}.",
        "FLOPs count attention as the full square; of parameters, embeddings are looked up and cost none.",
    ]
    if needed > device.memory:
        stage = max(held, key=lambda name: held[name])
        notes.append(f"{stage} does not fit on the {device.name}. {_way_out(estimate, stage, device.memory)}")
    if device.reading is None:
        notes.append("Hours are not known for a CPU: probe=60s measures it.")
    elif "probed" not in device.name:
        notes.append(
            "Hours rest on the maker's peak and shares of it that are ours: probe=60s measures them instead."
        )
    return notes
