"""What is paid before and beside the work: `python benchmarks/startup.py [--rounds N] [--cells N] [--rows N]`.

Each case in a process of its own, in turn, each round; ratios are over the same round's `import torch`. Shown are
medians over the rounds: of seconds on the clock, and of CPU time, which a busy machine moves less. Beside them, the
seconds from a command to its first progress, and to its first step, over those to the first step of TRL's
SFTTrainer on the same model and as many rows, where TRL is installed, here or where `--peer-python` says.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from operator import truediv
from pathlib import Path
from statistics import median

from watch import BAR, watched

import sddx.tiny

SMALL = (
    "trainer.budget=steps", "trainer.steps=2", "validation=16", "dataset.size=64", "pruning.remove=2", "loss=sft",
    "calibration.size=16", "text.size=16", "evaluation.limit=4",
)  # fmt: skip
STEP, TRL_STEP = re.compile(rb"training:\s+[1-9]\d*%"), re.compile(rb"first step")
STATUS = {"refusal": 2}  # that a case ends with, where it is not 0


def timed(command: list[str], folder: Path, status: int = 0) -> tuple[float, float, str]:
    """Seconds of a command, seconds of CPU time, and what it printed."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != status:
        sys.exit(done.stdout + done.stderr)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def starts(folder: Path, rounds: int) -> dict[str, float]:
    """A refusal, a finished run and a plan, over `import torch`."""
    settings = [*SMALL, f"store={folder / 'store'}"]
    train = [sys.executable, "-m", "sddx.train"]
    cases = {
        "torch": [sys.executable, "-c", "import torch"],
        "refusal": [*train, "trainer.steps=-1"],
        "finished": [*train, *settings],
        "plan": [sys.executable, "-m", "sddx.commands", "plan", *settings],
    }
    for case in cases.values():  # what is built or compiled once
        subprocess.run(case, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    figures: dict[str, list[float]] = {}
    for _ in range(rounds):
        spent = {name: timed(case, folder, STATUS.get(name, 0))[:2] for name, case in cases.items()}
        for name, both in spent.items():
            for kind, own, of_torch in zip(("seconds", "cpu"), both, spent["torch"], strict=True):
                figures.setdefault(f"{name}_{kind}", []).append(own)
                figures.setdefault(f"{name}_over_torch_{kind}", []).append(own / of_torch)
    return {name: median(values) for name, values in figures.items() if not name.startswith("torch_over")}


def firsts(folder: Path, rounds: int, python: str) -> dict[str, float]:
    """Seconds from a command to its first progress and to its first step, on the same rows, and over the seconds to
    the first step of TRL's SFTTrainer on the same model, where an environment has it."""
    checkpoint = Path(sddx.tiny.__file__).parent / "checkpoint"
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in sums(1_024)), encoding="utf-8")
    spec = {"student": str(checkpoint), "rows": sums(1_024), "steps": 2, "batch": 8, "rate": 1e-4, "clock": "wall"}
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    rows = ["dataset=jsonl", "dataset.path=rows.jsonl", "dataset.prompt=prompt", "dataset.response=completion"]
    ours = [sys.executable, "-m", "sddx.train", *SMALL, *rows]
    has_trl = not subprocess.run([python, "-c", "import trl"], capture_output=True).returncode
    cases = {"first_progress": (ours, BAR), "first_step": (ours, STEP)}
    if has_trl:
        cases["trl"] = ([python, str(Path(__file__).with_name("peers.py")), "trl_text", "spec.json"], TRL_STEP)
    figures: dict[str, list[float]] = {}
    for number in range(rounds + 1):  # the first finds nothing compiled, and does not count
        for name, (command, pattern) in cases.items():
            own = [f"store={folder / f'{name}{number}'}"] if command is ours else []
            _, first, printed = watched([*command, *own], folder, pattern, to_the_end=False)
            if first is None:
                sys.exit(printed.decode())
            figures.setdefault(f"{name}_seconds", []).append(first)
    known = {name: values[1:] for name, values in figures.items()}
    over = {
        f"{name}_over_trl": median(map(truediv, known[f"{name}_seconds"], known["trl_seconds"]))
        for name in cases
        if has_trl and name != "trl"
    }
    return {name: median(values) for name, values in known.items()} | over


def sums(rows: int) -> list[dict[str, str]]:
    """So many short rows."""
    return [{"prompt": f"Add {n} and {n % 89}.", "completion": f"The sum is {n + n % 89}."} for n in range(rows)]


def check(cells: int) -> None:
    """In a process of its own: a sweep of so many cells is checked and planned, and runs nothing; then Hydra
    composes the same cells."""
    from sddx import train
    from sddx.config.entry import command
    from sddx.sweep.launcher import Grid

    launch = Grid.launch

    def timed_launch(self: Grid, job_overrides: list[list[str]], initial_job_idx: int) -> list:
        start = time.process_time()
        launch(self, job_overrides, initial_job_idx)
        checked = time.process_time()
        for each in job_overrides:
            self.context.config_loader.load_sweep_config(self.config, list(each))
        print(json.dumps([checked - start, time.process_time() - checked]))
        return []

    train.install()
    Grid.task, Grid.launch = None, timed_launch  # type: ignore[assignment]
    grid = [f"seed=range(0,{-(-cells // 10)})", "dataset.size=128,256,512,768,1024", "loss=sft,sdd"]
    sys.argv = ["sddx.train", "--multirun", *SMALL[:3], *grid, "hydra.sweep.dir=sweep", "store=store"]
    command(train.main)


def encode(rows: int) -> None:
    """In a process of its own: so many short rows prepared, and encoded for a training."""
    from memory import peak

    from sddx.data.encode import encode_all
    from sddx.data.shards import read_examples
    from sddx.models.load import load_tokenizer
    from sddx.runtime import Runtime
    from sddx.stages.prepare.run import prepare

    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in sums(rows)), encoding="utf-8")
    none = {"_target_": "sddx.data.checkers.none", "_partial_": True}
    node = {"_target_": "sddx.data.sources.jsonl", "path": "rows.jsonl", "size": None, "seed": 0, "check": none}
    node |= {"prompt": "prompt", "response": "completion", "rewrite": "instruction", "trains": []}
    tokenizer = load_tokenizer(Path(sddx.tiny.__file__).parent / "checkpoint")
    start, out = time.process_time(), Path("prepared")
    out.mkdir()
    prepare(out, files=[], runtime=Runtime(quiet=True), dataset=node, validation=0)
    prepared = time.process_time()
    examples = read_examples(out / "shards")
    read, before = time.process_time(), peak()
    encoded, _ = encode_all(tokenizer, examples, max_length=512)
    spent, after = time.process_time() - read, peak()
    assert len(encoded) == rows
    print(json.dumps([prepared - start, spent, after - before]))


def apart(folder: Path, case: str, count: int) -> list[float]:
    """What `check` or `encode` measure, in a process of their own."""
    (folder / case).mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--case", case, "--count", str(count)]
    return json.loads(timed(command, folder / case)[2].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    for name, default in (("rounds", 3), ("cells", 20), ("rows", 100_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peer-python", default=sys.executable, help="the Python of an environment that has TRL")
    parser.add_argument("--case", choices=("check", "encode"), help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        (check if asked.case == "check" else encode)(asked.count)
        return
    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = starts(folder, asked.rounds) if asked.rounds else {}
        figures |= firsts(folder, asked.rounds, asked.peer_python) if asked.rounds else {}
        if asked.cells:
            checked, composed = apart(folder, "check", asked.cells)
            figures |= {"check_cpu": checked, "compose_cpu": composed, "check_over_compose": checked / composed}
        if asked.rows:
            names = ("rows_prepared_cpu", "rows_encoded_cpu", "rows_encoded_mib")
            figures |= dict(zip(names, apart(folder, "encode", asked.rows), strict=True))
    for name, value in figures.items():
        print(f"{name:<32}{value:>10.2f}")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
