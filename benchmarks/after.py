"""What stands after recovery, on a random Llama of 16 blocks of 512: `python benchmarks/after.py --json FILE`.

Merging: SLERP of two checkpoints, against reading both and writing one (goal: at most 1.5 times the time, and at
most one shard of memory beyond), and against mergekit (goal: at most a fifth of its time). Drafting: four blocks of
16 removed and an adapter on, in the target's own weights and in weights of their own, against plain decoding (goal:
at most 1.15 times its memory); the removed blocks are damped so that about as many drafts stay as a student's.
On-policy: a student of the same cut writes 64 tokens to each of eight prompts and learns from the teacher by a
generalised Jensen-Shannon divergence, against TRL's DistillationTrainer, whose teacher is a second model.

Each case runs in a process of its own, round after round; the median of the rounds' ratios counts. Memory is what a
process takes beyond its imports, at its peak: pages of its own, looked at every two milliseconds; those of mapped
files, which the kernel may take back, are told beside it. Peers come with the extra `benchmarks`, or stand in an
environment of their own (`--mergekit-python ENV/bin/python`, `--trl-python`). What is absent is left out and said.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from llama import random_llama
from safetensors import safe_open
from safetensors.torch import save_file

SHARD = 100_000_000  # bytes; four of a checkpoint
TOGETHER, LOOKAHEAD, PROMPT, NEW, STEPS = 8, 4, 64, 64, 4
REMOVED, DAMPED = range(8, 12), 0.1


@torch.no_grad()
def checkpoints(folder: Path) -> None:
    """A base and two of which half of the tensors are siblings and half are not, so that both ways are taken."""
    made = random_llama()
    made.save_pretrained(folder / "base", max_shard_size=SHARD)
    for name in ("one", "two"):
        other = deepcopy(made)
        for number, weight in enumerate(other.parameters()):
            weight += torch.randn_like(weight) * weight.std() * (1e-3 if number % 2 else 0.5)
        other.save_pretrained(folder / name, max_shard_size=SHARD)


def copied(folder: Path, meter: Meter) -> dict[str, Any]:
    """Every tensor of both is read, and the first's are written."""
    meter.begin()
    with meter.timed():
        for file in sorted((folder / "one").glob("*.safetensors")):
            tensors = {}
            for name in ("two", "one"):
                with safe_open(folder / name / file.name, framework="pt") as opened:
                    for each in opened.keys():
                        tensors[each] = opened.get_tensor(each).clone()
            save_file(tensors, folder / "out" / file.name, metadata={"format": "pt"})
    return {}


def merged(folder: Path, meter: Meter) -> dict[str, Any]:
    """SLERP as runs do it."""
    from sddx.merging.files import merge_files
    from sddx.merging.methods import slerp

    meter.begin()
    with meter.timed():
        ways = merge_files([folder / "one", folder / "two"], folder / "base", folder / "out", slerp)
    return {"ways": dict(ways)}


def by_mergekit(folder: Path, meter: Meter) -> dict[str, Any]:
    """mergekit's SLERP."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    one, two = ({"model": str(folder / name)} for name in ("one", "two"))
    asked = {"merge_method": "slerp", "base_model": one["model"], "parameters": {"t": 0.5}, "dtype": "float32"}
    config = MergeConfiguration.model_validate({**asked, "models": [one, two]})
    threads = torch.get_num_threads()
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False, num_threads=threads)
    meter.begin()
    with meter.timed():
        run_merge(config, str(folder / "mergekit"), options)
    return {}


def plain(folder: Path, meter: Meter) -> dict[str, Any]:
    """The target alone, by our own decoding."""
    from sddx.models.decoding import greedy, write

    meter.begin()
    target = _damped()
    with meter.timed():
        texts = write(target, _prompts(), greedy, max_new_tokens=NEW, batch_size=TOGETHER, ends=[])
    return {"texts": texts}


def drafted(folder: Path, meter: Meter, *, copies: bool = False) -> dict[str, Any]:
    """The target and its draft, in one set of weights or in two."""
    import peft  # noqa: F401 (an import on first use would count as memory)

    from sddx.compression.compressed import compress
    from sddx.compression.remove import Removal
    from sddx.records import Cut
    from sddx.speculation.decoding import speculate
    from sddx.students.teacher import SharedTeacher, beside
    from sddx.training.tuning import lora

    meter.begin()
    made = compress(_damped(), [Removal(Cut.without(set(REMOVED), 16))])
    made.model = lora(made.model, 0, rank=8, alpha=16).eval()
    target = beside(SharedTeacher(made))
    draft = deepcopy(made.model) if copies else made.model
    with meter.timed():
        texts, counts = speculate(
            target, draft, _prompts(), lookahead=LOOKAHEAD, max_new_tokens=NEW, batch_size=TOGETHER, ends=[]
        )
    return {
        "texts": texts,
        "acceptance": sum(each.accepted for each in counts) / sum(each.tested for each in counts),
    }


def on_policy(folder: Path, meter: Meter) -> dict[str, Any]:
    """Steps of a student that writes its answers, with the teacher in its own weights."""
    import peft  # noqa: F401 (as above)

    from sddx.compression.compressed import compress
    from sddx.compression.remove import Removal
    from sddx.data.encode import Encoded
    from sddx.records import Cut
    from sddx.runtime import Runtime
    from sddx.students.teacher import SharedTeacher
    from sddx.training.fit import Fit
    from sddx.training.losses import jsd_beta
    from sddx.training.objective import Distilled, Objective
    from sddx.training.rollouts import Rollouts
    from sddx.training.tuning import lora
    from sddx.training.writer import Writer

    meter.begin()
    cut = Cut.without(set(REMOVED), 16)
    made = compress(random_llama(), [Removal(cut)])
    made.model = lora(made.model, 0, rank=8, alpha=16)
    labels = [-100] * (PROMPT - 1) + [0, -100]
    rows = [Encoded(str(number), [*prompt, 0], labels, 1) for number, prompt in enumerate(_prompts())]
    rollouts = Rollouts(first=NEW, last=NEW, repeats=0, batch_size=TOGETHER)
    term = Distilled(loss=partial(jsd_beta, beta=0.5, temperature=1.0), weight=1.0)
    objective = Objective(data="reference", terms={"jsd_beta": term}, rollouts=rollouts)
    writer = Writer(made.model, rollouts, rows, 0, max_length=PROMPT + NEW, ends=[], pad_id=0)
    fit = Fit(budget="steps", steps=STEPS, batch_size=TOGETHER, learning_rate=1e-4)
    with tempfile.TemporaryDirectory() as out, meter.timed():
        runtime = Runtime(quiet=True)
        trained = fit(
            made.model, SharedTeacher(made), objective, cut, rows, [], 0, 0, Path(out), runtime, writer=writer
        )
    return {"tokens": trained["supervised_tokens"], "writing": trained["rollouts"]["seconds"]}


def by_trl(folder: Path, meter: Meter) -> dict[str, Any]:
    """The same by TRL's DistillationTrainer, with its own chunked divergence and a second model as teacher. Its
    tokenizer knows one word a token."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DistillationConfig, DistillationTrainer

    meter.begin()
    words = Tokenizer(models.WordLevel({str(number): number for number in range(32_000)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", padding_side="left")
    student = random_llama()
    student.model.layers = torch.nn.ModuleList(
        layer for number, layer in enumerate(student.model.layers) if number not in REMOVED
    )
    for number, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = number
    student.config.num_hidden_layers = len(student.model.layers)
    rows = Dataset.from_dict({"prompt": [" ".join(map(str, prompt)) for prompt in _prompts()]})
    with tempfile.TemporaryDirectory() as out:
        trainer = DistillationTrainer(
            model=student,
            teacher_model=random_llama(),
            args=DistillationConfig(
                output_dir=out,
                per_device_train_batch_size=TOGETHER,
                max_steps=STEPS,
                learning_rate=1e-4,
                beta=0.5,
                max_completion_length=NEW,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),  # fmt: skip
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        with meter.timed():
            trainer.train()
    return {"tokens": STEPS * TOGETHER * NEW}


@torch.no_grad()
def _damped() -> Any:
    made = random_llama()
    for number in REMOVED:
        block = made.model.layers[number]
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            projection.weight *= DAMPED
    return made


def _prompts() -> list[list[int]]:
    drawn = torch.randint(32_000, (TOGETHER, PROMPT), generator=torch.Generator().manual_seed(1))
    return drawn.tolist()


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "copied": copied,
    "merged": merged,
    "mergekit": by_mergekit,
    "plain": plain,
    "one_copy": drafted,
    "two_copies": partial(drafted, copies=True),
    "on_policy": on_policy,
    "trl": by_trl,
}


class Meter:
    """What work takes in this process: seconds, of the clock and of the processor, and memory beyond what was held
    when it began."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self._own, self._over = 0, Event()
        self._watch = Thread(target=self._look, daemon=True)

    def begin(self) -> None:
        """All is imported, and what is held from now on counts."""
        self._before = _memory()
        self._watch.start()

    @contextmanager
    def timed(self) -> Iterator[None]:
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.figures |= {"seconds": time.perf_counter() - wall, "processor": time.process_time() - processor}

    def read(self) -> dict[str, float]:
        """The figures, memory in bytes."""
        self._over.set()
        self._watch.join()
        peak = _memory()["VmHWM"] - self._before["VmRSS"]
        return {**self.figures, "own": self._own - self._before["RssAnon"], "peak": peak}

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self._own = max(self._own, _memory()["RssAnon"])


def _memory() -> dict[str, int]:
    """Bytes of this process, of which those of its own and the most that it ever held, since it began alone: what
    `getrusage` says begins with the memory of the process that started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    pairs = (line.split(":") for line in lines)
    return {name: 1024 * int(value.split()[0]) for name, value in pairs if name.startswith(("Rss", "Vm"))}


def case(name: str, folder: Path, threads: int, python: Path | str = sys.executable) -> dict[str, Any]:
    """One case, in a process of its own, of another environment where that is named."""
    asked = ["--case", name, "--folder", str(folder), "--threads", str(threads)]
    start = time.perf_counter()
    done = subprocess.run([str(python), __file__, *asked], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.0f} s", file=sys.stderr)
    return {**json.loads(done.stdout.splitlines()[-1]), "process": seconds}


def _here(package: str) -> Path | None:
    """This Python, where it has a package."""
    return Path(sys.executable) if find_spec(package) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-python", type=Path, default=_here("mergekit"), help="of an environment with it")
    parser.add_argument("--trl-python", type=Path, default=_here("trl"), help="of an environment with it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.case:
        meter = Meter()
        print(json.dumps(CASES[asked.case](asked.folder, meter) | meter.read()))
        return
    figures = merging(asked) | drafting(asked) | learning(asked)
    for name, figure in figures.items():
        print(f"{name}: {figure:.3g}" if isinstance(figure, float) else f"{name}: {figure}")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def merging(asked: argparse.Namespace) -> dict[str, Any]:
    """SLERP against copying, and against mergekit where it is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints(folder)
        (folder / "out").mkdir()
        largest = max(file.stat().st_size for file in (folder / "one").glob("*.safetensors"))
        rounds = [_merging(asked, folder) for _ in range(asked.rounds)]
    figures = {
        "merge, times as long as copying": _ratio(rounds, "merged", "copied", "seconds"),
        "merge, times as long, in seconds of the processor": _ratio(rounds, "merged", "copied", "processor"),
        "merge, memory of its own in shards": _median(rounds, "merged", "own") / largest,
        "merge, memory with mapped files in shards": _median(rounds, "merged", "peak") / largest,
        "merge, seconds": _median(rounds, "merged", "seconds"),
        "merge, tensors by way": rounds[0]["merged"]["ways"],
    }
    if not asked.mergekit_python:
        return figures | {
            "merge, against mergekit": "left out: it is not installed, and no --mergekit-python is given"
        }
    return figures | {
        "merge, share of mergekit's seconds": _ratio(rounds, "merged", "mergekit", "seconds"),
        "merge, share of mergekit's seconds of the processor": _ratio(rounds, "merged", "mergekit", "processor"),
        "merge, share of mergekit's whole process": _ratio(rounds, "merged", "mergekit", "seconds", "process"),
        "merge, the same of ours, imports and all": _ratio(rounds, "merged", "mergekit", "process"),
        "mergekit, seconds": _median(rounds, "mergekit", "seconds"),
    }


def _merging(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    round = {name: case(name, folder, asked.threads) for name in ("copied", "merged")}
    if asked.mergekit_python:
        round["mergekit"] = case("mergekit", folder, asked.threads, asked.mergekit_python)
    return round


def drafting(asked: argparse.Namespace) -> dict[str, Any]:
    """Drafts in the target's weights and in their own against plain decoding."""
    names = ("plain", "one_copy", "two_copies")
    rounds = [{name: case(name, Path(), asked.threads) for name in names} for _ in range(asked.rounds)]
    same = sum(
        mine == theirs for mine, theirs in zip(*(rounds[0][name]["texts"] for name in names[:2]), strict=True)
    )
    speeds = {name: TOGETHER * NEW / _median(rounds, name, "seconds") for name in names}
    return {
        "draft, memory over plain decoding": _ratio(rounds, "one_copy", "plain", "own"),
        "draft, memory over plain decoding, weights of its own": _ratio(rounds, "two_copies", "plain", "own"),
        "draft, times as fast as plain decoding": _ratio(rounds, "plain", "one_copy", "seconds"),
        "draft, times as fast, weights of its own": _ratio(rounds, "plain", "two_copies", "seconds"),
        "draft, acceptance": rounds[0]["one_copy"]["acceptance"],
        "draft, texts that are plain decoding's": f"{same} of {TOGETHER}",
        **{f"{name}, tokens a second": speed for name, speed in speeds.items()},
    }


def learning(asked: argparse.Namespace) -> dict[str, Any]:
    """Steps on a student's own answers, against TRL's where it is."""
    rounds = [_learning(asked) for _ in range(asked.rounds)]
    figures = {
        "on-policy, seconds a step": _median(rounds, "on_policy", "seconds") / STEPS,
        "on-policy, share of them that writes": _ratio(rounds, "on_policy", "on_policy", "writing", "seconds"),
        "on-policy, GiB": _median(rounds, "on_policy", "own") / 2**30,
    }
    if not asked.trl_python:
        return figures | {"on-policy, against TRL": "left out: it is not installed, and no --trl-python is given"}
    return figures | {
        "on-policy, share of TRL's seconds": _ratio(rounds, "on_policy", "trl", "seconds"),
        "on-policy, share of TRL's seconds of the processor": _ratio(rounds, "on_policy", "trl", "processor"),
        "on-policy, share of TRL's memory": _ratio(rounds, "on_policy", "trl", "own"),
    }


def _learning(asked: argparse.Namespace) -> dict[str, Any]:
    round = {"on_policy": case("on_policy", Path(), asked.threads)}
    if asked.trl_python:
        round["trl"] = case("trl", Path(), asked.threads, asked.trl_python)
    return round


def _ratio(rounds: Sequence[dict[str, Any]], one: str, other: str, figure: str, over: str | None = None) -> float:
    return statistics.median(each[one][figure] / each[other][over or figure] for each in rounds)


def _median(rounds: Sequence[dict[str, Any]], name: str, figure: str) -> float:
    return statistics.median(each[name][figure] for each in rounds)


if __name__ == "__main__":
    main()
