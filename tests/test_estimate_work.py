"""Laws of how much a plan says that stages run, against the stages themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import SMALL
from families import VOCABULARY
from families import build as family_model
from test_coalitions import scored
from test_estimate import configured
from torch.utils.flop_counter import FlopCounterMode

from sddx import train
from sddx.compression.branches import NoAttention, NoFeedForward
from sddx.config.build import build
from sddx.data.shards import read_rows
from sddx.estimate import costs
from sddx.estimate.efforts import Judging
from sddx.estimate.skeleton import size_of
from sddx.estimate.texts import CHARACTERS, Items
from sddx.evaluation.likelihoods import likelihoods
from sddx.importance import coalitions
from sddx.importance.ablation import LeaveOneOut, Shapley
from sddx.importance.coalitions import TaskScore
from sddx.importance.score import score_units, works
from sddx.models.anatomy import blocks, branches
from sddx.pipeline import Run
from sddx.records import REWRITES_FILE, Artifact, Rewrite
from sddx.runtime import Runtime
from sddx.stages.cost import estimated
from sddx.store import Inputs, Store


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The rows that every branch of every block reads: two branches are a block."""
    rows: list[int] = []
    kinds = branches(model).values()
    cores = [getattr(block, kind.core) for block in blocks(model) for kind in kinds]

    def note(module: Any, arguments: tuple, named: dict[str, Any]) -> None:
        rows.append(len(arguments[0] if arguments else named["hidden_states"]))

    real = [core for core in cores if not isinstance(core, NoAttention | NoFeedForward)]
    handles = [core.register_forward_pre_hook(note, with_kwargs=True) for core in real]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def metrics() -> dict[str, dict[str, Any]]:
    found = configured("metrics=all", "pruning.remove=2")["metrics"]
    short = {"orders": 8, "count": 20}
    return {name: node | {key: new for key, new in short.items() if key in node} for name, node in found.items()}


@pytest.mark.parametrize("units", ["blocks", "attention", "sublayers"])
def test_a_metric_runs_as_many_blocks_as_it_says(units: str) -> None:
    """Exactly, but for the order of greedy removal, which hangs on what is found."""
    given = scored("llama", 4, units)
    built = {name: build(node) for name, node in metrics().items()}
    for name, metric in built.items():
        if "value" in vars(metric) and metric.value.sequences:
            metric.value.sequences = 5  # of six texts
        (work,) = works({name: metric}, given.units, given.sequences).values()
        with counted(given.model) as rows:
            score_units(given, {name: metric})
        passes = sum(rows) / 2 / given.units.total
        near = 0.15 if name == "greedy" else 1e-9
        assert work.body + work.learned == pytest.approx(passes, rel=near), name


@pytest.mark.parametrize("units", ["blocks", "sublayers"])
def test_a_task_is_evaluated_on_as_many_blocks_as_it_says(units: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, judged = scored("llama", 4, units), list[float]()

    def judge(model: Any, *_: Any, **__: Any) -> dict[str, Any]:
        with counted(model) as rows, torch.no_grad():
            model(given.batches[0].input_ids[:1])
        judged.append(sum(rows) / 2)
        return {"tasks": {"it": {"samples": [{"score": 1.0}], "part_of": "it"}}}

    monkeypatch.setattr(coalitions, "evaluate", judge)
    given = replace(given, tokenizer=type("Tokenizer", (), {"chat_template": None})())
    value = TaskScore(tasks=["tiny_arithmetic"], limit=1)
    for metric in (LeaveOneOut(value=value), Shapley(value=value, orders=4)):
        (work,) = works({"it": metric}, given.units, given.sequences).values()
        judged.clear()
        metric.measure(given)
        assert work.models == pytest.approx(sum(judged) / 4) and not work.body


@pytest.mark.parametrize("size", [4, 12])
def test_answers_that_share_a_question_cost_what_a_plan_says(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question once and every answer, with the head on answers alone; so many tokens an answer."""
    model, count, passes = family_model("llama"), 12, 4
    items = Items(count, passes, CHARACTERS * (32 + size), CHARACTERS * size)
    monkeypatch.setattr("sddx.estimate.efforts.items_of", lambda *_: items)
    monkeypatch.setattr("sddx.estimate.texts.items_of", lambda *_: items)
    draw = torch.Generator().manual_seed(0)
    asked = []
    for _ in range(count):
        question = torch.randint(2, VOCABULARY, (32,), generator=draw).tolist()
        answers = torch.randint(2, VOCABULARY, (passes, size), generator=draw).tolist()
        asked += [((question + answer)[:-1], answer) for answer in answers]
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        assert len(list(likelihoods(model, asked))) == count * passes
    planned = Judging(tasks=["it"], packed=True).effort(size_of(model)).reading
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.15)


class Metered(Store):
    """A store that counts the FLOPs of what it builds, by stage."""

    flops: Counter[str]

    def build(self, stage: Any, inputs: Inputs, /, **spec: Any) -> Artifact:
        judged = "recovered" if inputs.get("student") else "pruned" if inputs.get("cut") else "unpruned"
        name = f"evaluate {judged}" if stage.__name__ == "evaluate" else stage.__name__
        with FlopCounterMode(display=False) as counter:
            made = super().build(stage, inputs, **spec)
        self.flops[name] += counter.get_total_flops()
        return made


def test_stages_compute_what_a_plan_says(tmp_path: Path) -> None:
    """FLOPs within 15 % (an answer's decoding with them), and none in a stage that is left out but a proof's."""
    less = ("dataset.size=16", "evaluation.limit=2", "text.size=8", "calibration.size=8")
    given = ("loss=kd", "pruning/patch=block", "pruning.patch.fit.epochs=1", "model.attention=eager")
    config = configured(*SMALL, *less, *given)
    store = Metered(tmp_path)
    store.flops = Counter()
    _ = Run(store, Runtime(quiet=True), train.method(config)).report
    estimate, planned = estimated(config), Counter[str]()
    for part in estimate.parts():
        size = estimate.unpruned if part.stage == "evaluate unpruned" else estimate.pruned
        planned[part.stage] += int(part.reading + part.learning + part.tokens["written"] * size.decode(60))
    for stage, flops in planned.items():
        assert store.flops[stage] == pytest.approx(flops, rel=0.15), stage
    assert {stage for stage, flops in store.flops.items() if flops} == {*planned, "prune"}


def test_looking_at_answers_computes_what_a_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is told how long they are, which no plan knows."""
    config = configured(*SMALL, "dataset.size=16", "calibration.size=8", "loss=sdd", "model.attention=eager")
    store = Metered(tmp_path)
    store.flops = Counter()
    run = Run(store, Runtime(quiet=True), train.method(config))
    assert run.written
    written = read_rows(Rewrite, *(shard.path / REWRITES_FILE for shard in run.rows))
    own, references = (sum(len(getattr(row, name)) for row in written) for name in ("answer", "reference"))
    monkeypatch.setattr(costs, "WRITTEN", own / references)
    planned = sum(part.reading for part in estimated(config).parts() if part.stage == "written")
    assert store.flops["written"] == pytest.approx(planned, rel=0.15)
