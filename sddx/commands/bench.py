"""What pruning buys: the recovered model (its adapter merged) against the unpruned one, at the same work.

    sddx bench run=outputs/.../summary.json

run      the summary.json that a run names at its end, or its folder; bench.json is written beside it
batch    sequences at once (default 1)
context  tokens that are read before the first is written (default 512)
new      tokens that are written (default 64)
repeats  measurements of each model, in pairs that follow each other (default 5)
device   auto (default), cpu, cuda
dtype    of the weights (default: the run's)
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from sddx.config import writable_folder
from sddx.config.arguments import REQUIRED, exit_status, number, plain_arguments
from sddx.errors import UserError
from sddx.models.anatomy import decoder, is_adapted
from sddx.models.load import find_device, load_model
from sddx.store.manifest import replace_text
from sddx.students.recovered import find_own

MODELS = ("unpruned", "pruned")
STATES = ("conv_states", "recurrent_states")  # by number, in a cache of transformers
Make = Callable[[], Any]


def measure(model: Any, ids: torch.Tensor, new: int) -> dict[str, float]:
    """One timed pass: read `ids` [batch, context], then write `new` tokens greedily with the cache.

    Tokens per second over the whole batch, for reading (`prefill`) and for every token after the first (`decode`);
    `seconds_to_first_token` until it is known to the program; bytes of the cache at the end; on CUDA the most
    bytes that were allocated beyond the weights of all models (`peak_bytes`). Raises ValueError for fewer than two
    new tokens, which leave nothing to time.
    """
    if new < 2:
        raise ValueError(f"at least two new tokens are needed, not {new}")
    device = ids.device
    held = _allocated(device)
    with torch.inference_mode():
        start = _now(device)
        made = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        read = _now(device)
        token = made.logits[:, -1:].argmax(-1)
        token.tolist()
        first = _now(device)
        for _ in range(new - 1):
            made = model(input_ids=token, past_key_values=made.past_key_values, use_cache=True, logits_to_keep=1)
            token = made.logits[:, -1:].argmax(-1)
        end = _now(device)
    figures = {
        "prefill_tokens_per_second": ids.numel() / (read - start),
        "decode_tokens_per_second": len(ids) * (new - 1) / (end - first),
        "seconds_to_first_token": first - start,
        "cache_bytes": _cache_bytes(made.past_key_values),
    }
    return figures | (
        {"peak_bytes": torch.cuda.max_memory_allocated(device) - held} if device.type == "cuda" else {}
    )


def _now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _allocated(device: torch.device) -> int:
    """Bytes on the GPU, from where its peak is counted anew."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _cache_bytes(cache: Any) -> int:
    """Of keys and values, and of what layers of another kind remember instead."""
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", *STATES)]
    held = [tensor for each in held for tensor in (each.values() if isinstance(each, dict) else [each])]
    return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


def race(
    make_unpruned: Make, make_pruned: Make, *, batch: int = 1, context: int = 512, new: int = 64, repeats: int = 5
) -> dict[str, Any]:
    """Time two models, each made by a function without arguments, at the same work: after an untimed pass of each,
    `repeats` pairs of measurements, the one first in every other pair.

    Returns what was done (the context is cut to what both models have room for), per model the median of each
    measurement, parameters and their bytes, and under `ratios` pruned / unpruned: of counts and bytes one number,
    of times and speeds the median over the pairs with the least and the greatest. Both models are held at once.
    Raises UserError for fewer than two new tokens, where they leave no room for context, and where memory has no
    room for both models.
    """
    if new < 2:
        raise UserError(f"new={new}: the first token is timed apart, so nothing is left to time. Give 2 or more.")
    try:
        models = dict(zip(MODELS, (make_unpruned(), make_pruned()), strict=True))
        room = min(_room(model) for model in models.values())
        if new >= room:
            raise UserError(f"new={new} fills all {room} positions of the model. Give fewer: some must be read.")
        ids = _prompt(models["unpruned"], batch, min(context, room - new))
        runs = _pairs(models, ids, new, repeats)
    except (MemoryError, RuntimeError) as error:
        if not _is_full(error):
            raise
        raise UserError(
            f"both models are held at once, and memory has no room for them (or for the cache): {error} Give a "
            "smaller batch or context, or another device."
        ) from error
    work = {"batch": batch, "context": ids.shape[1], "asked_context": context, "new": new, "repeats": repeats}
    sizes = {name: _size(model) for name, model in models.items()}
    return {**work, **_where(ids.device, models), **_summarised(sizes, runs), "runs": runs}


def _is_full(error: Exception) -> bool:
    """Whether a device or the host has no memory left, which torch has three ways to say."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _room(model: Any) -> int:
    return getattr(decoder(model).config, "max_position_embeddings", None) or sys.maxsize


def _prompt(model: Any, batch: int, context: int) -> torch.Tensor:
    """Random tokens, the same in every call."""
    vocabulary = decoder(model).config.vocab_size
    ids = torch.randint(vocabulary, (batch, context), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


def _pairs(models: dict[str, Any], ids: torch.Tensor, new: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Measurements of both models, close to each other in time, so that what else the machine does hits both."""
    for model in models.values():
        measure(model, ids, new)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for repeat in range(repeats):
        for name in MODELS if repeat % 2 == 0 else MODELS[::-1]:
            runs[name].append(measure(models[name], ids, new))
    return runs


def _size(model: Any) -> dict[str, int]:
    weights = list(model.parameters())
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "parameter_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
    }


def _summarised(sizes: dict[str, dict[str, int]], runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {name: dict(size) for name, size in sizes.items()}
    for name, measured in runs.items():
        figures[name] |= {what: statistics.median(run[what] for run in measured) for what in measured[0]}
        if "peak_bytes" in figures[name]:
            figures[name]["peak_bytes"] += sizes[name]["parameter_bytes"]
    ratios: dict[str, Any] = {}
    for what in figures["unpruned"]:
        if what.endswith("second") or what.startswith("seconds"):
            each = [b[what] / a[what] for a, b in zip(runs["unpruned"], runs["pruned"], strict=True)]
            ratios[what] = {"median": statistics.median(each), "low": min(each), "high": max(each)}
        else:
            ratios[what] = figures["pruned"][what] / figures["unpruned"][what]
    return figures | {"ratios": ratios}


def _where(device: torch.device, models: dict[str, Any]) -> dict[str, Any]:
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    dtype = str(next(models["unpruned"].parameters()).dtype).removeprefix("torch.")
    about = {"device": device.type, "device_name": name, "dtype": dtype, "threads": torch.get_num_threads()}
    return about | {"attention": models["unpruned"].config._attn_implementation, "torch": torch.__version__}


LABELS = {
    "parameters": "parameters",
    "parameter_bytes": "parameters, MB",
    "cache_bytes": "cache at the end, MB",
    "peak_bytes": "peak memory, MB",
    "prefill_tokens_per_second": "reading, tokens/s",
    "decode_tokens_per_second": "writing, tokens/s",
    "seconds_to_first_token": "to the first token, ms",
}


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the table, and what the numbers are of."""
    table = Table(
        "", "unpruned", "pruned", "pruned / unpruned", "range", title="What pruning buys", title_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for what in (what for what in LABELS if what in figures["unpruned"]):
        ratio = figures["ratios"][what]
        timed = isinstance(ratio, dict)
        spread = f"{ratio['low']:.2f} to {ratio['high']:.2f}" if timed else "-"
        cells = [_shown(what, figures[name][what]) for name in MODELS]
        table.add_row(LABELS[what], *cells, f"{ratio['median'] if timed else ratio:.3f}", spread)
    console.print(table)
    context, asked = figures["context"], figures["asked_context"]
    cut = "" if context == asked else f" (asked: {asked}, more than fits)"
    console.print(
        f"batch {figures['batch']}, context {context}{cut}, {figures['new']} new tokens, {figures['repeats']} "
        f"pairs on {figures['device_name']} in {figures['dtype']}; medians, and the range of the ratio over the "
        "pairs. The share of parameters is no speed: embeddings and head stay, and attention costs more as the "
        "context grows.",
        highlight=False,
    )


def _shown(what: str, value: float) -> str:
    if what.endswith("bytes"):
        return f"{value / 1e6:,.2f}"
    return f"{1000 * value:.1f}" if what.startswith("seconds") else f"{value:,.0f}"


def bench(
    path: str | Path, *, dtype: str | None = None, device: str = "cpu", **work: int
) -> tuple[Path, dict[str, Any]]:
    """`race` between the models of a run (its `summary.json`); returns the path of the `bench.json` written beside
    it, and its content. The recovered model's adapter is merged. Raises UserError as `find_own` and `race` do."""
    run = find_own(path)
    writable_folder(run.folder, "run")
    disable_progress_bar()

    def recovered() -> Any:
        student = run.student(dtype, device).model
        return student.merge_and_unload() if is_adapted(student) else student

    figures = race(lambda: load_model(run.base, **run.loading(dtype, device)), recovered, **work)
    figures = {"depth": run.cut.name, "pruned_is": "recovered, adapter merged", **figures}
    place = run.folder / "bench.json"
    replace_text(place, json.dumps(figures, indent=1) + "\n")
    return place, figures


@exit_status
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a run's models. Returns the exit status: 0, or 2 for a mistake of the user's."""
    argv = sys.argv[1:] if arguments is None else arguments
    defaults = {"batch": "1", "context": "512", "new": "64", "repeats": "5", "device": "auto", "dtype": None}
    values = plain_arguments(argv, __doc__, run=REQUIRED, **defaults)
    work = {name: number(values, name) for name in ("batch", "context", "new", "repeats")}
    place, figures = bench(values["run"], dtype=values["dtype"], device=find_device(values["device"]), **work)
    show(figures, Console(width=max(100, Console().width)))
    print(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
