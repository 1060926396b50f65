"""Laws of stages whose models are in shards: each process finds what one finds that has all weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import SMALL, composed, resolve
from families import adapt
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import sddx
from sddx.compression.compressed import compress
from sddx.compression.remove import Removal
from sddx.data.shards import write_rows
from sddx.importance.coalitions import TaskScore
from sddx.importance.score import Subject
from sddx.models.load import frozen_model, load_model, load_tokenizer
from sddx.parallel.distributed import rank, world
from sddx.parallel.launch import launch
from sddx.records import Artifact, Cut, Example, Units
from sddx.runtime import Runtime
from sddx.stages.distill.run import distill
from sddx.stages.evaluate.run import evaluate
from sddx.stages.patch.run import patch
from sddx.stages.score.run import score
from sddx.store import RESUME
from sddx.students.student import save_student
from sddx.train import run

pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("quick_groups")]

MODEL = Artifact("model", "base", Path(sddx.__file__).parent / "tiny" / "checkpoint")
HOW = {"dtype": "float32", "attention": "sdpa"}
WHOLE_BLOCKS = Cut((0, 1, 2, 3, 4, 6, 8, 9, 10, 11), 12)
BRANCHES = Cut(tuple(range(12)), 12, no_attention=(3,), no_feedforward=(7,))
LOSS = {"_target_": "sddx.importance.coalitions.Loss", "sequences": 3}
METRICS = {
    "angular": {"_target_": "sddx.importance.metrics.angular_distance", "_partial_": True},
    "left_out": {"_target_": "sddx.importance.ablation.LeaveOneOut", "value": LOSS},
    "taylor": {"_target_": "sddx.importance.taylor.Taylor", "sequences": 3},
}
SIZE = ("evaluation.limit=3", "evaluation.max_new_tokens=32", "generation.max_new_tokens=24")


def settings(*overrides: str) -> dict[str, Any]:
    with composed(*SMALL, *SIZE, "calibration.size=8", "text.size=4", *overrides) as cfg:
        return resolve(cfg)


def artifact(stage: str, folder: Path) -> Artifact:
    (folder / stage).mkdir(parents=True, exist_ok=True)
    return Artifact(stage, stage, folder / stage)


def fitted(out: Path, cut: Path, name: str, runtime: Runtime) -> None:
    config = settings(f"pruning/patch={name}")
    asked = {key: value for key, value in config["pruning"]["patch"].items() if key != "_target_"}
    inputs = {"base": MODEL, "cut": Artifact("prune", "cut", cut), "files": []}
    patch(out, **inputs, runtime=runtime, patch=asked, calibration=config["calibration"], **HOW)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a model without two blocks, and a model without two branches, one patched."""
    folder = tmp_path_factory.mktemp("built")
    for name, cut in (("adapted", WHOLE_BLOCKS), ("patched", BRANCHES)):
        cut.save(artifact("prune", folder / name).path / "cut.json")
    model = load_model(MODEL.path)
    made = compress(model, [Removal(WHOLE_BLOCKS)])
    made.model = adapt(model)
    save_student(made, artifact("train", folder / "adapted").path, base=MODEL.key)
    where = folder / "patched"
    fitted(artifact("patch", where).path, where / "prune", "linear", Runtime(quiet=True))
    rows = [Example(str(n), f"Mia has {n} nuts and gets 9 more. How many nuts?", f"#### {n + 9}") for n in range(3)]
    write_rows(rows, folder / "rows.jsonl")
    return folder


def look(built: Path, out: Path, config: dict[str, Any], *, runtime: Runtime) -> None:
    """What every process runs: all stages that only look at a model, each into a folder of its own."""
    folder = out / f"{rank()} of {world()}"
    calibration = config["calibration"]
    score(artifact("score", folder).path, base=MODEL, files=[], runtime=runtime, metrics=METRICS, units="sublayers",
          calibration=calibration, **HOW)  # fmt: skip
    for name, temperature in (("greedy", 0.0), ("sampled", 0.8)):
        writer = config["generation"] | {"temperature": temperature, "batch_size": 2}
        rows = Artifact("rows", "rows", built / "rows.jsonl")
        asked = {"rewrite": config["dataset"]["rewrite"], **HOW}
        distill(artifact("distill", folder / name).path, base=MODEL, shard=rows, runtime=runtime, guided=True,
                generation=writer, **asked)  # fmt: skip
    cut, adapter, fitted = {"cut": "prune"}, {"student": "train"}, {"patch": "patch"}
    for name, made in {"whole": {}, "adapted": cut | adapter, "patched": cut | fitted}.items():
        inputs = {each: artifact(stage, built / name) for each, stage in made.items()}
        asked = {"evaluation": config["evaluation"], "text": config["text"], **HOW}
        evaluate(artifact("evaluate", folder / name).path, base=MODEL, files=[], **inputs, runtime=runtime, **asked)
    units, model = Units("sublayers", 12), frozen_model(MODEL.path, **HOW, device=runtime.device)
    value = TaskScore(tasks=["tiny_facts"], limit=2)
    subject = Subject(model, load_tokenizer(MODEL.path), units, [], runtime)
    scored = value.of(subject, [tuple(number not in (0, 5) for number in range(24))])
    (folder / "task.json").write_text(json.dumps(scored.tolist()))
    held = {name: isinstance(weight, DTensor) for name, weight in model.named_parameters()}
    assert world() == 1 or all(in_shards == ("layers" in name) for name, in_shards in held.items())


def found(folder: Path) -> dict[str, Any]:
    """All files that stages wrote, as values; without what they would resume from, which the first process has."""
    paths = [path for path in folder.rglob("*.json*") if RESUME not in path.parts]
    files = {str(path.relative_to(folder)): path.read_text() for path in paths}
    return {n: [*map(json.loads, text.splitlines() if n.endswith("l") else [text])] for n, text in files.items()}


def same(ours: Any, theirs: Any, at: str = "") -> None:
    """Equal, numbers to rounding in float32."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), at
        pairs = [(ours[name], theirs[name], f"{at}/{name}") for name in theirs]
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), at
        pairs = [(a, b, f"{at}/{place}") for place, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    else:
        close = isinstance(theirs, float)
        assert ours == (pytest.approx(theirs, rel=1e-4, abs=1e-5) if close else theirs), at
        pairs = []
    for a, b, place in pairs:
        same(a, b, place)


def test_every_process_finds_what_one_finds(built, tmp_path):
    """Scores by states, gradients and coalitions of branches; answers, greedy and sampled; evaluations of the
    unpruned model, of one with an adapter beside its teacher in the same shards, and of one whose blocks are twins,
    beside a second copy. Answers that the first process has of an earlier attempt are asked of none."""
    work = partial(look, built, tmp_path, settings())
    work(runtime=Runtime(quiet=True))
    answered = Path("whole", "evaluate", RESUME, "answers.jsonl")
    (tmp_path / "0 of 2" / answered).parent.mkdir(parents=True)
    lines = (tmp_path / "0 of 1" / answered).read_text().splitlines(keepends=True)
    (tmp_path / "0 of 2" / answered).write_text("".join(lines[: len(lines) // 2]))
    launch(work, 2, Runtime(quiet=True))
    alone = found(tmp_path / "0 of 1")
    assert len(alone) == 9 and alone["patched/evaluate/results.json"][0]["text"]["kl"] > 1e-3
    asked = [json.loads(line)[0] for line in (tmp_path / "0 of 2" / answered).read_text().split("\n") if line]
    assert sorted(asked) == sorted(json.loads(line)[0] for line in lines[1:])
    for number in range(2):
        same(found(tmp_path / f"{number} of 2"), alone)


def test_a_patch_is_that_of_one_process(built, tmp_path):
    """Of the kind that is trained: a whole block beside a model in shards."""
    for shards in (1, 2):
        fitted(artifact(str(shards), tmp_path).path, built / "adapted" / "prune", "block",
               Runtime(shards=shards, quiet=True))  # fmt: skip
    same(found(tmp_path / "2"), found(tmp_path / "1"))
    ours, theirs = (load_file(tmp_path / str(shards) / "junction.safetensors") for shards in (2, 1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_sharded_run_ends_as_a_run_on_one_device(tmp_path):
    """The same tables and, but for what is trained, the same artifacts: shards are no part of a key."""
    summaries = []
    for strategy, devices in (("single", 1), ("fsdp", 2)):
        out = tmp_path / strategy
        given = (f"store={out / 'store'}", f"trainer.strategy={strategy}", f"trainer.devices={devices}",
                 "trainer.accumulate=2", "trainer.batch_size=4", "loss=sft", "dataset.size=16",
                 "evaluation.tasks=[tiny_facts]")  # fmt: skip
        with composed(*SMALL, *SIZE, *given, out=out) as cfg:
            summaries.append(json.loads(run(resolve(cfg), out).read_text()))
    one, two = summaries
    for stage in ("score", "prune", "evaluate_unpruned", "evaluate_pruned"):
        assert two["artifacts"][stage] == one["artifacts"][stage]
    for name in ("scores", "recovery", "text", "cut", "supervised_tokens", "unparsed", "overlap"):
        same(two[name], one[name], name)
