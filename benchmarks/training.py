"""What distillation costs over fine-tuning, and both over a bare loop and TRL: `python benchmarks/training.py`.

Each case trains the same pruned student, with the same adapter, rows and steps, in a process of its own. The cases
are run in turn, so many `--rounds`, and every ratio is the median over the rounds of two cases of one round. The
first step, which warms up, is in no time; peak memory is all that the process ever held. Without `--model` (the
folder of a model) it is a random Llama of 83M parameters. Peers are left out where TRL is not installed, here or in
the environment whose Python `--peer-python` names. `--json FILE` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from llama import random_llama
from memory import peak
from transformers import AutoConfig

from sddx.compression.compressed import Compressed, compress
from sddx.compression.remove import Removal
from sddx.data.encode import Encoded, collate
from sddx.models.load import DTYPES, load_model
from sddx.models.outputs import run
from sddx.records import Cut
from sddx.runtime import Runtime
from sddx.students.cached import MANIFEST, CachedTeacher, Writer, row_key
from sddx.students.teacher import SharedTeacher, Teacher
from sddx.training import losses
from sddx.training.batches import plan
from sddx.training.coarse import likeliest
from sddx.training.fit import Fit
from sddx.training.objective import Distilled, Layerwise, Objective, Supervised
from sddx.training.tuning import lora

BATCH, LENGTH, RATE = 8, 256, 1e-4
KEPT = 64  # tokens that a captured teacher keeps
ORIGIN = dict.fromkeys(("model", "tokenizer", "template", "vocabulary", "k", "max_length"), 0) | {
    "temperature": 1.0
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TERMS = {
    "sft": {},
    "packed": {},  # the same in packed rows
    "kd": {"kl": Distilled(loss=losses.kl_teacher_student)},
    "cached": {"kl": Distilled(loss=losses.kl_teacher_student)},
    "squarehead": {"squarehead": Layerwise(loss=losses.squarehead)},
}
OURS = ("bare", "sft", "kd", "squarehead", "cached", "bare_mixed", "sft_mixed", "packed_mixed")
PEERS = ("trl_sft", "trl_kd", "trl_gkd")
# By name: which figure of which case over which other one.
FIGURES = {
    "sft_over_bare": ("rate", "sft", "bare"),
    "sft_over_bare_mixed": ("rate", "sft_mixed", "bare_mixed"),
    "packed_over_padded_mixed": ("rate", "packed_mixed", "sft_mixed"),
    "packed_memory_mixed": ("memory", "packed_mixed", "sft_mixed"),
    "sft_over_trl": ("rate", "sft", "trl_sft"),
    "sft_over_trl_memory": ("memory", "sft", "trl_sft"),
    "kd_time": ("seconds", "kd", "sft"),
    "kd_memory": ("memory", "kd", "sft"),
    "kd_over_trl": ("rate", "kd", "trl_kd"),
    "kd_over_gkd": ("rate", "kd", "trl_gkd"),
    "cached_time": ("seconds", "cached", "sft"),
    "cached_memory": ("memory", "cached", "sft"),
    "squarehead_time": ("seconds", "squarehead", "sft"),
    "squarehead_memory": ("memory", "squarehead", "sft"),
}


def cut_of(folder: Path) -> Cut:
    """A quarter of the blocks, before the last two."""
    total = AutoConfig.from_pretrained(folder).num_hidden_layers
    return Cut.without(range(total - 2 - total // 4, total - 2), total)


def rows_of(vocabulary: int, steps: int, mixed: bool) -> list[dict[str, Any]]:
    """Random rows, each a prompt length and its ids: all of one length and labelled whole; or mixed, of 32 to 256
    tokens with a prompt of a half that is not labelled."""
    dice = random.Random(0)
    lengths = [dice.randint(LENGTH // 8, LENGTH) if mixed else LENGTH for _ in range(steps * BATCH)]
    return [{"ids": dice.choices(range(vocabulary), k=n), "prompt": n // 2 if mixed else 1} for n in lengths]


def encoded(rows: list[dict[str, Any]]) -> list[Encoded]:
    made = []
    for number, row in enumerate(rows):
        ids, prompt = row["ids"], row["prompt"]
        labels = [-100] * (prompt - 1) + ids[prompt:] + [-100]
        made.append(Encoded(str(number), ids, labels, len(ids) - prompt))
    return made


def student_of(folder: Path, dtype: str) -> Compressed:
    made = compress(load_model(folder, dtype=dtype), [Removal(cut_of(folder))])
    made.model = lora(made.model.requires_grad_(False), 0)
    return made


def captured(folder: Path, dtype: str, rows: list[Encoded], out: Path) -> None:
    """The unpruned model's likeliest tokens on all rows, as `teacher_cache` keeps them."""
    out.mkdir()
    model = load_model(folder, dtype=dtype).eval()
    writer = Writer(out, [row.supervised for row in rows], KEPT, KEPT + 1)
    with torch.no_grad():
        for number, row in enumerate(rows):
            batch = collate([row], 0)
            outputs = run(model, batch.input_ids, batch.attention_mask)
            writer.put([number], likeliest(outputs.head(outputs.hidden[batch.labels != -100]), KEPT, 1.0))
    keys = [[row_key(row.input_ids, row.labels), row.supervised] for row in rows]
    (out / MANIFEST).write_text(json.dumps({"origin": ORIGIN, "rows": keys}))


def teacher_of(case: str, made: Compressed, capture: Path) -> Teacher | None:
    """In the student's weights, on disk, or none."""
    if case in ("kd", "squarehead"):
        return SharedTeacher(made)
    made.whole = {}
    return CachedTeacher([capture], ORIGIN) if case == "cached" else None


def sddx(case: str, spec: dict[str, Any], rows: list[Encoded], tick: Callable[[], None]) -> int:
    """Trains by an arm's terms; gives the tokens of all steps but the first."""
    steps = spec["steps"]
    made = student_of(Path(spec["teacher"]), spec["dtype"])
    teacher = teacher_of(case, made, Path(spec["capture"]))
    terms = {"cross_entropy": Supervised(loss=losses.cross_entropy), **TERMS[case]}
    settings = {"budget": "steps", "steps": steps, "batch_size": BATCH, "learning_rate": RATE, "log_every": 1}
    fit = Fit(**settings, packing=case == "packed")
    runtime = Runtime(quiet=True, log=lambda row: tick())
    with tempfile.TemporaryDirectory() as out:
        fit(
            made.model,
            teacher,
            Objective(data="reference", terms=terms),
            made.cut,
            rows,
            [],
            0,
            0,
            Path(out),
            runtime,
        )
    return sum(step.totals.attended for step in plan(rows, 0, batch_size=BATCH, budget="steps", steps=steps)[1:])


def bare(spec: dict[str, Any], rows: list[Encoded], tick: Callable[[], None]) -> int:
    """The shortest loop that trains: rows as they come, whole logits, mean loss, clip, step."""
    model = student_of(Path(spec["teacher"]), spec["dtype"]).model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=RATE, fused=True)
    for start in range(0, len(rows), BATCH):
        batch = collate(rows[start : start + BATCH], 0)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        tick()
    return sum(len(row.input_ids) for row in rows[BATCH:])


def measured(case: str, spec: dict[str, Any]) -> dict[str, float]:
    """Seconds and tokens of all steps but the first, and the peak memory of this process in MiB."""
    rows, now, ticks = encoded(spec["rows"]), CLOCKS[spec["clock"]], list[float]()
    arm = case.removesuffix("_mixed")
    trained = bare if arm == "bare" else partial(sddx, arm)
    tokens = trained(spec, rows, lambda: ticks.append(now()))
    return {"seconds": ticks[-1] - ticks[0], "tokens": tokens, "memory": peak()}


def in_child(case: str, python: str, specs: dict[str, Path]) -> dict[str, float]:
    """A case in a process of its own."""
    script = Path(__file__).with_name("peers.py" if case in PEERS else Path(__file__).name)
    spec = specs["mixed" if case.endswith("_mixed") else "fixed"]
    done = subprocess.run([python, str(script), case, str(spec)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{case} failed")
    return json.loads(done.stdout.splitlines()[-1])


def figures(rounds: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Every ratio that the cases allow, as the median over the rounds."""

    def ratio(one: dict[str, float], other: dict[str, float], measure: str) -> float:
        if measure == "rate":
            return one["tokens"] / one["seconds"] / (other["tokens"] / other["seconds"])
        return one[measure] / other[measure]

    return {
        name: median(ratio(cases[one], cases[other], measure) for cases in rounds)
        for name, (measure, one, other) in FIGURES.items()
        if {one, other} <= rounds[0].keys()
    }  # fmt: skip


def prepared(asked: argparse.Namespace, room: Path) -> dict[str, Path]:
    """The models and the rows of all cases, as files: a spec of each kind of rows."""
    model = Path(asked.model) if asked.model else room / "model"
    if not asked.model:
        random_llama(DTYPES[asked.dtype]).save_pretrained(model)
    student = compress(load_model(model, dtype=asked.dtype), [Removal(cut_of(model))])
    student.model.save_pretrained(room / "student")
    vocabulary = student.model.config.vocab_size
    specs = {}
    for kind in ("fixed", "mixed"):
        spec = {"teacher": str(model), "student": str(room / "student"), "vocabulary": vocabulary, "batch": BATCH}
        spec |= {"rate": RATE, "dtype": asked.dtype, "steps": asked.steps, "clock": asked.clock}
        spec["rows"] = rows_of(vocabulary, asked.steps, kind == "mixed")
        spec["capture"] = str(room / f"capture_{kind}")
        if "cached" in asked.cases and kind == "fixed":
            captured(model, asked.dtype, encoded(spec["rows"]), Path(spec["capture"]))
        specs[kind] = room / f"{kind}.json"
        specs[kind].write_text(json.dumps(spec))
    return specs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a model; without it a random Llama of 83M parameters")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cases", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: beside other work, with one thread"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="the Python of an environment that has TRL")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    has_trl = not subprocess.run([asked.peer_python, "-c", "import trl"], capture_output=True).returncode
    cases = [case for case in asked.cases if has_trl or case not in PEERS]
    if not has_trl:
        print("TRL is not installed: its cases are left out")
    rounds = []
    with tempfile.TemporaryDirectory() as room:
        specs = prepared(asked, Path(room))
        for number in range(asked.rounds):
            rounds.append({})
            for case in cases:
                made = in_child(case, asked.peer_python if case in PEERS else sys.executable, specs)
                made.setdefault(
                    "tokens", (asked.steps - 1) * BATCH * LENGTH
                )  # a peer's, whose rows are of one length
                rounds[-1][case] = made
                rate = made["tokens"] / made["seconds"]
                print(f"{number + 1}  {case:12} {rate:8,.0f} tokens/s  {made['memory']:7,.0f} MiB", flush=True)
    summary = figures(rounds)
    for name, value in summary.items():
        print(f"{name:22} {value:.3f}")
    if asked.json:
        asked.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in OURS:
        print(json.dumps(measured(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))))
    else:
        main()
