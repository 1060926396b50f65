"""Laws of the training loop: what is seen when, exact accumulation, resuming, what is trained and saved."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sddx.compression.compressed import compress
from sddx.compression.remove import Removal
from sddx.data.encode import Encoded
from sddx.errors import UserError
from sddx.records import PROFILE_FILE, Cut
from sddx.runtime import Runtime
from sddx.students.teacher import SeparateTeacher, SharedTeacher
from sddx.training import batches
from sddx.training.batches import StepLoader, order, plan
from sddx.training.fit import Fit
from sddx.training.losses import cross_entropy, kl_teacher_student, squarehead, squarehead_token
from sddx.training.module import Distiller, TrainingDiverged, cosine_with_warmup
from sddx.training.objective import Distilled, Layerwise, Objective, Supervised
from sddx.training.profiling import TRACE
from sddx.training.tuning import full, lora

CUT = Cut((0, 1, 3), 4)
SFT = Objective(data="reference", terms={"cross_entropy": Supervised(loss=cross_entropy)})
EVERYTHING = Objective(
    data="reference",
    terms={
        "cross_entropy": Supervised(loss=cross_entropy),
        "kl": Distilled(loss=partial(kl_teacher_student, temperature=2.0), weight=0.5),
        "squarehead": Layerwise(loss=squarehead_token, junction="span_end", reduction="token", weight=0.3),
    },
)


class Killed(Exception):
    """Stands for a process that ends in the middle of a training."""


@dataclass
class Log:
    """Keeps rows in the file of an artifact, as the store does: rows of an earlier attempt stay where there
    is something to resume from. May kill the run at a step."""

    out: Path
    kill_at: int | None = None

    def __post_init__(self) -> None:
        if not (self.out / "resume").exists():
            (self.out / "metrics.jsonl").unlink(missing_ok=True)

    def __call__(self, row: dict[str, Any]) -> None:
        if row["step"] == self.kill_at:
            raise Killed
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows but for what depends on the clock."""
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return [
            {name: value for name, value in json.loads(line).items() if "per_second" not in name} for line in lines
        ]


def examples(number: int, seed: int = 0) -> list[Encoded]:
    """Rows of 3 to 12 tokens whose first tokens are not trained."""
    dice = random.Random(seed)
    rows = []
    for _ in range(number):
        length = dice.randint(3, 12)
        prompt = dice.randint(1, length - 1)
        ids = [dice.randrange(2, VOCABULARY) for _ in range(length)]
        rows.append(Encoded("", ids, [-100] * prompt + (ids[1:] + [1])[prompt:], supervised=length - prompt))
    return rows


def pruned(tune: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A tuned student of three of four blocks, and its teacher: the same weights, or a copy for full."""
    model = build("llama", blocks=4).to(dtype)
    made = compress(model, [Removal(CUT)])
    if tune is full:
        return full(model, 0), SeparateTeacher(build("llama", blocks=4).to(dtype))
    made.model = tune(model, 0)
    return made.model, SharedTeacher(made)


ADAPTER = partial(lora, rank=2, alpha=4, dropout=0.2, targets="all-linear")


def train(out: Path, *, tune: Any = ADAPTER, objective: Objective = SFT, dtype: Any = torch.float32,
          rows: list[Encoded] | None = None, held_out: int = 0, seed: int = 0, log: Any = None,
          **settings: Any) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """A student trained with these settings, and what fit said."""
    student, teacher = pruned(tune, dtype)
    out.mkdir(exist_ok=True)
    runtime = Runtime(quiet=True, log=log or (lambda row: None))
    fit = Fit(**{"batch_size": 4, "log_every": 1} | settings)
    report = fit(student, teacher if objective.needs_teacher else None, objective, CUT,
                 rows or examples(12), examples(held_out, seed=1), 1, seed, out, runtime)  # fmt: skip
    return student, report


def weights(student: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in student.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(("steps", "seen"), [(1, 1), (3, 2), (6, 3)])
def test_a_profile_shows_where_the_time_goes_and_moves_nothing(tmp_path, caplog, steps, seen):
    """A table and a trace beside the student, which is the one that is trained without; a resumed training too."""
    settings = {"budget": "steps", "steps": steps}
    plain, _ = train(tmp_path / "plain", **settings)
    with caplog.at_level("INFO"):
        looked_at, _ = train(tmp_path / "key.partial", profile=True, **settings)
    assert all(torch.equal(value, weights(looked_at)[name]) for name, value in weights(plain).items())
    table = (tmp_path / "key.partial" / PROFILE_FILE).read_text()
    assert "Self CPU" in table and "aten::mm" in table
    with gzip.open(tmp_path / "key.partial" / TRACE) as trace:
        assert len({e["name"] for e in json.load(trace)["traceEvents"] if "ProfilerStep" in e["name"]}) == seen
    assert str(tmp_path / "key" / PROFILE_FILE) in caplog.text and f"{seen} steps" in caplog.text


# The order of examples and the budget


def members(steps: list[Any]) -> list[int]:
    return [row for step in steps for part in step.micro_batches for row in part]


def test_order_is_a_function_of_seed_and_epoch():
    """Same (seed, epoch), same order; another seed or epoch, another order; every row once an epoch."""
    rows = examples(50)
    orders = {(seed, epoch): order(rows, seed, epoch, step_size=4, pool=3) for seed in (0, 1) for epoch in (0, 1)}
    assert orders[0, 0] == order(rows, 0, 0, step_size=4, pool=3)
    assert len({json.dumps(steps) for steps in orders.values()}) == 4
    for steps in orders.values():
        assert sorted(row for step in steps for row in step) == list(range(50))
    epochs = plan(rows, 0, batch_size=4, epochs=2, pool=3)
    assert [sorted(part) for step in epochs for part in step.micro_batches] == [
        sorted(step) for epoch in (0, 1) for step in orders[0, epoch]
    ]


def test_order_is_pinned():
    """The order does not change unnoticed between versions: a stored key would stand for another training."""
    assert order(examples(6), 3, 1, step_size=2, pool=1) == [[1, 4], [0, 3], [5, 2]]


def test_pools_of_like_length_save_padding():
    """Sorting within a pool leaves less padding than none, and steps come in no order of length."""
    rows = examples(400)

    def padding(pool: int) -> int:
        steps = order(rows, 0, 0, step_size=8, pool=pool)
        lengths = [[len(rows[r].input_ids) for r in step] for step in steps]
        return sum(max(step) * len(step) - sum(step) for step in lengths)

    assert padding(16) < 0.4 * padding(1)
    longest = [max(len(rows[r].input_ids) for r in step) for step in order(rows, 0, 0, step_size=8, pool=16)]
    assert sum(a > b for a, b in zip(longest, longest[1:], strict=False)) > 10


def test_micro_batches_do_not_move_examples_between_steps():
    """2 x 4, 4 x 2 and 8 x 1 have the same examples in each step, and the same totals."""
    rows = examples(21)
    plans = [plan(rows, 0, batch_size=b, accumulate=8 // b, epochs=2) for b in (8, 4, 2)]
    steps = [[(sorted(members([s])), s.totals.labelled, s.totals.attended) for s in each] for each in plans]
    assert steps[0] == steps[1] == steps[2]
    assert [s.totals.micro_batches for s in plans[2]] == [-(-s.examples // 2) for s in plans[2]]
    assert all(len(part) <= 2 for step in plans[2] for part in step.micro_batches)
    total = sum(row.supervised for row in rows)
    assert sum(step.totals.labelled for step in plans[0]) == 2 * total


def test_budget_of_examples_tokens_and_steps():
    """`examples`: every row `epochs` times. `tokens`: stops with the example that reaches the number, over
    as many epochs as it takes. `steps`: exactly so many. All are heads of the same sequence of examples."""
    rows = examples(10)
    by_examples = plan(rows, 0, batch_size=4, epochs=3)
    assert set(Counter(members(by_examples)).values()) == {3}
    assert len(plan(rows, 0, batch_size=4, budget="steps", steps=7)) == 7
    assert plan(rows, 0, batch_size=4, budget="steps", steps=7) == by_examples[:7]
    wanted = 2 * sum(row.supervised for row in rows) + 5
    by_tokens = plan(rows, 0, batch_size=4, budget="tokens", tokens=wanted)
    seen = sum(step.totals.labelled for step in by_tokens)
    assert wanted <= seen < wanted + max(row.supervised for row in rows)
    assert by_tokens[:-1] == by_examples[: len(by_tokens) - 1]
    assert set(members(by_tokens[-1:])) <= set(members(by_examples[len(by_tokens) - 1 :][:1]))


@pytest.mark.parametrize(("budget", "settings"), [("steps", {}), ("tokens", {}), ("examples", {"epochs": 0})])
def test_a_budget_needs_its_number(budget, settings):
    """Told where the settings are, before there are rows."""
    number = {"steps": "steps", "tokens": "tokens", "examples": "epochs"}[budget]
    with pytest.raises(UserError, match=rf"trainer.budget={budget} needs trainer.{number}="):
        Fit(budget=budget, **settings)
    with pytest.raises(ValueError, match=number):
        plan(examples(4), 0, batch_size=2, budget=budget, **settings)


def test_nothing_to_train_on_is_refused():
    """Rows without any label would train nothing, or never reach a budget of tokens."""
    rows = [Encoded("", [2, 3], [-100, -100], supervised=0)]
    for given in (rows, []):
        with pytest.raises(UserError, match="nothing to train on"):
            plan(given, 0, batch_size=1, budget="tokens", tokens=5)


def test_a_restored_loader_goes_on_where_it_stood():
    """The rest after a restart is the rest of the undisturbed pass, to the last tensor."""
    rows = examples(10)
    steps = plan(rows, 0, batch_size=2, accumulate=2)
    first, again = StepLoader(rows, steps, 1), StepLoader(rows, steps, 1)
    stream = iter(first)
    next(stream)
    again.load_state_dict(first.state_dict())
    for (step, parts), (same_step, same_parts) in zip(stream, again, strict=True):
        assert step == same_step
        assert all(torch.equal(a.labels, b.labels) for a, b in zip(parts, same_parts, strict=True))
    assert first.position == len(first) == 3


# The loop


@pytest.mark.parametrize("tune", [ADAPTER, full], ids=["lora", "full"])
def test_accumulation_is_exact(tmp_path, tune):
    """2 x 4 and 4 x 2 accumulation end with the weights of 1 x 8, for every term that claims the law, with a
    shared and with a separate teacher, a short last step included."""
    tune = tune if tune is full else partial(tune, dropout=0.0)
    settings = dict(tune=tune, objective=EVERYTHING, dtype=torch.float64, rows=examples(13), epochs=2)
    whole, report = train(tmp_path / "1x8", batch_size=8, **settings)
    before = weights(pruned(tune, torch.float64)[0])
    for batch_size in (2, 4):
        cut_up, again = train(tmp_path / f"{batch_size}", batch_size=batch_size,
                              accumulate=8 // batch_size, head_chunk=3, **settings)  # fmt: skip
        torch.testing.assert_close(weights(cut_up), weights(whole), rtol=0, atol=1e-9)
        assert again["train"] == pytest.approx(report["train"], rel=1e-9)
    moved = [(value - before[name]).abs().max() for name, value in weights(whole).items()]
    assert report["steps"] == 4 and max(moved) > 1e-4


@pytest.mark.parametrize("tune", [ADAPTER, full], ids=["lora", "full"])
def test_checkpointed_blocks_change_no_number(tmp_path, monkeypatch, tune):
    """Each block runs once more, in the backward pass, dropout and hidden states included; losses, gradient norms
    and weights stay as they are, with frozen embeddings and a shared teacher as with neither."""
    blocks_run: list[int] = []
    run_block = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda *given, **more: (blocks_run.append(1), run_block(*given, **more))[1]
    )
    found = []
    for again in (False, True):
        blocks_run.clear()
        (out := tmp_path / str(again)).mkdir()
        log = Log(out)
        student, report = train(out, tune=tune, objective=EVERYTHING, log=log, gradient_checkpointing=again)
        found.append((weights(student), log.rows(), len(blocks_run)))
    (once, rows, runs), (twice, same_rows, more) = found
    assert all(torch.equal(value, twice[name]) for name, value in once.items()) and rows == same_rows
    assert more == runs + report["steps"] * len(CUT.kept)


def test_paper_squarehead_depends_on_how_the_step_was_cut(tmp_path):
    """The accumulation law is not claimed for the paper's form, which is why the other one exists."""
    objective = Objective(data="self", terms={"squarehead": Layerwise(loss=squarehead)})
    settings = dict(objective=objective, tune=partial(ADAPTER, dropout=0.0), budget="steps", steps=1)
    values = [
        train(tmp_path / str(size), batch_size=size, accumulate=8 // size, **settings)[1]["train"]["loss"]
        for size in (8, 2)
    ]
    assert abs(values[0] - values[1]) > 1e-4


def test_the_loss_is_the_token_mean_of_torch(tmp_path):
    """The logged loss of the first step is torch's cross-entropy over all labelled tokens of the step."""
    rows = examples(8)
    log = Log(tmp_path)
    train(tmp_path, rows=rows, batch_size=2, accumulate=4, epochs=1, log=log, tune=full)
    model = pruned(full)[0]
    total = sum(
        torch.nn.functional.cross_entropy(
            model(torch.tensor([row.input_ids])).logits[0], torch.tensor(row.labels), reduction="sum"
        ).item()
        for row in rows
    )
    tokens = sum(row.supervised for row in rows)
    first = log.rows()[0]
    assert first["train/cross_entropy"] == pytest.approx(total / tokens, rel=1e-5)
    assert first["train/supervised_tokens"] == tokens and first["step"] == 1


def test_rows_carry_every_term_and_the_weighted_total(tmp_path):
    """loss = sum of weight * term; rate, tokens and speed stand beside; held-out rows are logged apart."""
    rows: list[dict] = []
    _, report = train(tmp_path, objective=EVERYTHING, epochs=2, held_out=5, validate_every=2, log=rows.append)
    trained = [row for row in rows if "train/loss" in row]
    held_out = [row for row in rows if "validation/loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in held_out] == [2, 4, 6]
    for kind, of in (("train", trained), ("validation", held_out)):
        for row in of:
            parts = sum(t.weight * row[f"{kind}/{name}"] for name, t in EVERYTHING.terms.items())
            assert row[f"{kind}/loss"] == pytest.approx(parts, rel=1e-5)
    assert all(row["train/tokens_per_second"] > 0 and row["train/learning_rate"] > 0 for row in trained)
    assert report["supervised_tokens"] == trained[-1]["train/supervised_tokens"]
    assert report["validation"]["loss"] == held_out[-1]["validation/loss"]


def test_one_batch_overfits(tmp_path):
    """A student that is shown four examples again and again knows them by heart."""
    _, report = train(tmp_path, rows=examples(4), tune=full, budget="steps", steps=60, learning_rate=1e-2)
    assert report["train"]["cross_entropy"] < 0.1


def test_bf16_trains_close_to_float32(tmp_path):
    """Mixed precision keeps float32 weights and follows the float32 loss."""
    reports = [train(tmp_path / p, precision=p, objective=EVERYTHING, epochs=2)[1]["train"] for p in ("32", "bf16")]
    assert reports[1]["loss"] == pytest.approx(reports[0]["loss"], rel=0.05)
    assert reports[1]["loss"] != reports[0]["loss"]


def test_seed_decides_order_and_dropout_and_nothing_else_does(tmp_path):
    """Same seed, same weights, bit for bit, whatever was drawn before; another seed, other weights."""
    first, _ = train(tmp_path / "a")
    torch.rand(7)
    again, _ = train(tmp_path / "b")
    other, _ = train(tmp_path / "c", seed=1)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(first).items())
    assert any(not torch.equal(value, weights(other)[name]) for name, value in weights(first).items())


@pytest.mark.parametrize(("keep", "step"), [("best", 2), ("last", 3)])
def test_what_is_kept(tmp_path, keep, step):
    """Held-out losses of 3, 1, 2 after three steps: `best` goes back to the weights after the second, bit for
    bit, `last` keeps those after the third."""
    student, _ = pruned(full)
    snapshots: list[dict[str, torch.Tensor]] = []

    def scripted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return cross_entropy(logits, labels)
        snapshots.append(weights(student))
        return torch.full(labels.shape, [3.0, 1.0, 2.0][len(snapshots) - 1])

    objective = Objective(data="self", terms={"scripted": Supervised(loss=scripted)})
    fit = Fit(batch_size=4, epochs=1, validate_every=1, keep=keep)
    held_out = examples(3, seed=1)
    report = fit(student, None, objective, CUT, examples(12), held_out, 1, 0, tmp_path, Runtime(quiet=True))
    assert report["kept_step"] == step and report["steps"] == len(snapshots) == 3
    assert report["validation"]["loss"] == [3.0, 1.0, 2.0][step - 1]
    kept = [all(torch.equal(v, shot[name]) for name, v in weights(student).items()) for shot in snapshots]
    assert kept == [False, step == 2, step == 3]


def test_keeping_the_best_needs_held_out_rows(tmp_path):
    """There would be nothing to choose by."""
    with pytest.raises(UserError, match="held-out"):
        train(tmp_path, keep="best", validate_every=1)
    with pytest.raises(UserError, match="validates after the last step alone"):
        Fit(keep="best")


def test_matrices_alone_decay(tmp_path):
    """With a rate at which no gradient moves anything and a decay that halves: norms stay what they are."""
    student, _ = pruned(full)
    before = weights(student)
    fit = Fit(batch_size=4, budget="steps", steps=1, learning_rate=1e-12, warmup=0.0, weight_decay=0.5e12)
    fit(student, None, SFT, CUT, examples(4), [], 1, 0, tmp_path, Runtime(quiet=True))
    for name, weight in weights(student).items():
        torch.testing.assert_close(weight, before[name] * (0.5 if weight.dim() > 1 else 1.0), rtol=0, atol=1e-9)


def test_cosine_schedule_by_hand(tmp_path):
    """Ten steps, two of warm-up: half, whole, then half a cosine towards 0 at step 10; as logged, too."""
    factor = cosine_with_warmup(10, 0.2)
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert [factor(step) for step in range(10)] == pytest.approx(expected)
    assert factor(6) == pytest.approx(0.5) and factor(10) == pytest.approx(0)
    assert cosine_with_warmup(4, 0.0)(0) == 1
    rows: list[dict] = []
    train(tmp_path, budget="steps", steps=10, warmup=0.2, learning_rate=1e-3, log=rows.append)
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([1e-3 * f for f in expected])


# What is trained and saved


class ModuleTeacher(torch.nn.Module):
    """A teacher that is a torch module, which plain assignment would register in the student's module."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.model = inner, inner.model

    def forward(self, batch: Any, *, states: bool) -> Any:
        return self.inner(batch, states=states)


def test_the_teacher_is_in_neither_checkpoint_nor_optimiser(tmp_path):
    """Not among the parameters, the optimiser's or the state dict's, and training leaves it as it was."""
    student, teacher = pruned(full)
    theirs = {id(value) for value in teacher.model.parameters()}
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    module = Distiller(student, ModuleTeacher(teacher), EVERYTHING, CUT, 0, steps_total=2, learning_rate=0.1)
    optimisers, _ = module.configure_optimizers()
    ours = {id(value) for group in optimisers[0].param_groups for value in group["params"]}
    assert ours == {id(value) for value in student.parameters()} and not ours & theirs
    assert not theirs & {id(value) for value in module.parameters()}
    assert all(name.startswith("student.") for name in module.state_dict())
    Fit(epochs=2)(student, teacher, EVERYTHING, CUT, examples(4), [], 1, 0, tmp_path, Runtime(quiet=True))
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())


def test_a_checkpoint_holds_the_adapter_only_and_loads_as_plain_tensors(tmp_path):
    """With LoRA nothing of the base model is trained or saved, and a frozen weight never moves."""
    with pytest.raises(Killed):
        train(tmp_path, objective=EVERYTHING, checkpoint_every=2, log=Log(tmp_path, kill_at=3))
    saved = torch.load(tmp_path / "resume" / "last.ckpt", weights_only=True)
    student, _ = pruned(ADAPTER)
    adapter = {f"student.{name}" for name in weights(student)}
    assert set(saved["state_dict"]) == adapter and all("lora_" in name for name in adapter)
    assert len(saved["optimizer_states"][0]["state"]) == len(adapter)
    trained, _ = train(tmp_path / "whole", objective=EVERYTHING)
    frozen = {name: value for name, value in student.named_parameters() if not value.requires_grad}
    after = dict(trained.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_nothing_but_the_students_weights_is_left_behind(tmp_path):
    """A finished training leaves what it could resume from (the store's to delete) and nothing else, and a
    student in eval mode."""
    student, _ = train(tmp_path, checkpoint_every=1)
    assert [path.name for path in tmp_path.iterdir()] == ["resume"]
    assert not any(module.training for module in student.modules())


def test_the_adapter_is_a_function_of_the_seed():
    """Same seed, same initial adapter; another seed, another; the caller's random stream is left alone."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    adapters = []
    for seed in (0, 0, 1):
        model = build("llama", blocks=2)
        torch.manual_seed(5)
        adapters.append(weights(lora(model, seed, rank=2)))
        assert torch.equal(torch.rand(1), expected)
    same = [torch.equal(value, adapters[1][name]) for name, value in adapters[0].items()]
    other = [torch.equal(value, adapters[2][name]) for name, value in adapters[0].items()]
    assert all(same) and not all(other)


def test_targets_are_checked():
    """Only the named layers are adapted; a name that fits nothing is refused with the names that exist."""
    names = weights(lora(build("llama", blocks=2), 0, rank=2, targets=["q_proj", "down_proj"]))
    assert len(names) == 2 * 2 * 2 and all("q_proj" in name or "down_proj" in name for name in names)
    everything = weights(lora(build("llama", blocks=2), 0, rank=2))
    assert len(everything) == 2 * 7 * 2 and not any("lm_head" in name for name in everything)
    with pytest.raises(UserError, match="query.*q_proj"):
        lora(build("llama", blocks=2), 0, targets=["q_proj", "query"])
    with pytest.raises(UserError, match="is empty"):
        lora(build("llama", blocks=2), 0, targets=[])


def test_a_half_precision_base_keeps_a_float32_adapter():
    """Small updates would be lost in bfloat16."""
    student = lora(build("llama", blocks=2).bfloat16(), 0, rank=2)
    assert {value.dtype for value in weights(student).values()} == {torch.float32}


def test_what_an_objective_needs_is_checked_before_work():
    """A missing teacher, and layers to compare where the cut leaves none."""
    student, _ = pruned(full)
    make = partial(Distiller, student, seed=0, steps_total=1, learning_rate=0.1)
    with pytest.raises(UserError, match="kl.*teacher"):
        make(teacher=None, objective=EVERYTHING, cut=CUT)
    term = Layerwise(loss=squarehead, junction="skip")
    layers = Objective(data="self", terms={"squarehead": term})
    with pytest.raises(UserError, match="no layer"):
        make(teacher=lambda batch, states: None, objective=layers, cut=Cut((0,), 2))


# Stopping


@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_resuming_in_mid_epoch_changes_nothing(tmp_path, monkeypatch, killed_after):
    """A run killed after some steps and started again sees the examples it had not finished with, logs the
    same rows and ends with bit-identical weights: dropout, optimiser, schedule and the best so far included.
    (Six steps in two epochs, a checkpoint after every second.)"""
    seen: list[list[int]] = []
    collect = batches.micro_batches

    def spy(rows: Any, step: Any, pad_id: int) -> Any:
        seen.append(members([step]))
        return collect(rows, step, pad_id)

    monkeypatch.setattr(batches, "micro_batches", spy)
    settings = dict(epochs=2, checkpoint_every=2, held_out=5, validate_every=2, keep="best",
                    objective=EVERYTHING, learning_rate=1e-2)  # fmt: skip
    (tmp_path / "whole").mkdir()
    log = Log(tmp_path / "whole")
    whole, report = train(tmp_path / "whole", log=log, **settings)
    undisturbed, seen[:] = list(seen), []

    out = tmp_path / "killed"
    out.mkdir()
    with pytest.raises(Killed):
        train(out, log=Log(out, kill_at=killed_after + 1), **settings)
    assert seen == undisturbed[: killed_after + 1]
    seen.clear()
    second = Log(out)
    resumed, again = train(out, log=second, **settings)
    assert seen == undisturbed[killed_after // 2 * 2 :]
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert second.rows() == log.rows()
    clock = {"tokens_per_second": 0, "seconds": 0}
    assert again | clock == report | clock


def test_a_checkpoint_of_another_student_is_refused(tmp_path):
    """Resuming restores every trained parameter or nothing."""
    with pytest.raises(Killed):
        train(tmp_path, checkpoint_every=1, log=Log(tmp_path, kill_at=2))
    with pytest.raises(UserError, match="other parameters"):
        train(tmp_path, tune=partial(ADAPTER, targets=["q_proj"]))


def test_nan_stops_and_names_step_and_term(tmp_path):
    """A term that is not finite ends the training before it reaches the weights."""
    calls = []

    def spoilt(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(len(labels))
        return cross_entropy(logits, labels) * (math.nan if len(calls) == 3 else 1.0)

    objective = Objective(
        data="self", terms={"sound": Supervised(loss=cross_entropy), "spoilt": Supervised(loss=spoilt)}
    )
    student, _ = pruned(ADAPTER)
    with pytest.raises(TrainingDiverged, match="step 3 of 9: spoilt is nan"):
        fit = Fit(batch_size=4, epochs=3)
        fit(student, None, objective, CUT, examples(12), [], 1, 0, tmp_path, Runtime(quiet=True))
    assert all(value.isfinite().all() for value in weights(student).values())


def test_a_gradient_that_is_not_finite_stops(tmp_path):
    """A finite loss with an infinite gradient would ruin the weights one step before the loss shows it."""

    def cliff(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits.sum(-1) * 0).sqrt()  # 0, with the slope of a square root at 0

    objective = Objective(data="self", terms={"cliff": Supervised(loss=cliff)})
    with pytest.raises(TrainingDiverged, match="step 1 of 9: gradient_norm is"):
        train(tmp_path, objective=objective)


def test_lightning_is_quiet(tmp_path, capfd):
    """No banners, tips or warnings on either stream."""
    train(tmp_path, held_out=4, budget="steps", steps=2)
    assert capfd.readouterr() == ("", "")
