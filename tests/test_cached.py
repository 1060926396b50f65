"""Laws of the cached teacher: what is kept of it is what it said, and a student learns from that as from itself."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composing import SMALL, composed, resolve
from safetensors.torch import load_file
from torch.nn import functional

import sddx
from sddx.data.checkers import last_number
from sddx.data.encode import collate, encode_all, padding_id
from sddx.data.shards import write_rows
from sddx.errors import UserError
from sddx.estimate.peaks import peaks
from sddx.models.load import load_model, load_tokenizer
from sddx.pipeline import Run
from sddx.records import Artifact, Coarse, Example
from sddx.report import table
from sddx.runtime import Runtime
from sddx.stages.capture import run as stage
from sddx.stages.cost import estimated
from sddx.store import Store
from sddx.students.cached import IDS, LOGS, MANIFEST, CachedTeacher, origin, row_key
from sddx.tiny import data
from sddx.train import look, method, run, verify
from sddx.training.coarse import alike, likeliest, mass
from sddx.training.losses import jsd_beta, kl_student_teacher, kl_teacher_student
from sddx.training.objective import Distilled, Objective

CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"
VOCABULARY = 484  # of that model
DIVERGENCES = {
    "forward": kl_teacher_student,
    "reverse": kl_student_teacher,
    "jsd": partial(jsd_beta, beta=0.3),
}
ENCODED = {"max_length": 64, "dtype": "float32", "attention": "sdpa"}


def draw(*shape: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coarsely(loss: Callable, student: torch.Tensor, coarse: Coarse) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence from what is kept of a teacher: [rows], and its gradient."""
    leaf = student.clone().requires_grad_()
    values = loss(*alike(leaf, coarse), temperature=coarse.temperature)
    values.sum().backward()
    return values.detach(), leaf.grad


# The mathematics


@pytest.mark.fast
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_with_the_whole_vocabulary_it_is_the_dense_divergence(name: str, temperature: float) -> None:
    """Values and gradients, in whatever order the tokens are kept."""
    student, teacher, loss = draw(6, 11), draw(6, 11, seed=1), DIVERGENCES[name]
    leaf = student.clone().requires_grad_()
    dense = loss(leaf, teacher, temperature=temperature)
    dense.sum().backward()
    values, gradient = coarsely(loss, student, likeliest(teacher, 11, temperature))
    torch.testing.assert_close(values, dense.detach())
    torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.fast
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_coarse_divergence_is_a_lower_bound_that_grows(name: str, temperature: float) -> None:
    """The data processing inequality: from 0 or more up to the dense value, never down, with every token kept."""
    student, teacher, loss = draw(200, 11), draw(200, 11, seed=1), DIVERGENCES[name]
    below = torch.zeros(200, dtype=torch.float64)
    for k in range(1, 12):
        values, _ = coarsely(loss, student, likeliest(teacher, k, temperature))
        assert (values >= below - 1e-12).all()
        below = values
    torch.testing.assert_close(below, loss(student, teacher, temperature=temperature))


@pytest.mark.fast
@pytest.mark.parametrize("k", [1, 3, 10, 11])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_are_those_of_finite_differences(name: str, temperature: float, k: int) -> None:
    coarse = likeliest(draw(4, 11, seed=1), k, temperature)
    loss = partial(DIVERGENCES[name], temperature=temperature)
    assert torch.autograd.gradcheck(lambda x: loss(*alike(x, coarse)), draw(4, 11).requires_grad_())


@pytest.mark.fast
@pytest.mark.parametrize("k", [2, 5])
def test_what_is_kept_is_what_the_full_softmax_says(k: int) -> None:
    """By numpy: the sorted probabilities, and 1 minus their sum."""
    logits = draw(50, 9)
    coarse = likeliest(logits, k, 2.0)
    weights = np.exp(logits.numpy() / 2)
    ordered = -np.sort(-weights / weights.sum(1, keepdims=True), axis=1)
    kept = ordered[:, :k]
    np.testing.assert_allclose(coarse.logs.exp()[:, :k], kept)
    np.testing.assert_allclose(coarse.logs.exp()[:, k], 1 - kept.sum(1))
    np.testing.assert_allclose(mass(coarse), kept.sum(1))
    assert torch.equal(coarse.ids, logits.argsort(1, descending=True)[:, :k])


@pytest.mark.fast
@pytest.mark.parametrize("name", DIVERGENCES)
def test_certain_models_give_finite_numbers(name: str) -> None:
    """In float32: a teacher with nothing left for the rest; a student with all in it, or nothing; and in half
    precision what float32 gives."""
    sure = torch.full((3, 9), -60.0).scatter(1, torch.tensor([[0], [4], [8]]), 60.0)
    flat = torch.zeros(3, 9)
    for student, teacher in ((sure, sure), (sure.flip(1), sure), (flat, sure), (sure, flat)):
        for k in (1, 8, 9):
            values, gradient = coarsely(DIVERGENCES[name], student, likeliest(teacher, k, 1.0))
            assert values.isfinite().all() and gradient.isfinite().all() and (values > -1e-5).all()
    coarse, half = likeliest(draw(3, 9, seed=1).float(), 2, 2.0), draw(3, 9).bfloat16()
    values, gradient = coarsely(DIVERGENCES[name], half, coarse)
    exact, slope = coarsely(DIVERGENCES[name], half.float(), coarse)
    assert torch.equal(values, exact) and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), slope, atol=1e-2, rtol=1e-2)


@pytest.mark.fast
def test_a_rest_that_is_nearly_nothing_is_not_lost_to_rounding() -> None:
    """A student with 2e-12 left: 1 minus the sum of the others is 0 in float32, which has no logarithm."""
    student = torch.tensor([[0.0, math.log(1e-12), math.log(1e-12)]])
    buckets, _ = alike(student, likeliest(torch.tensor([[5.0, 0.0, 0.0]]), 1, 1.0))
    assert buckets.log_softmax(-1)[0, 1].item() == pytest.approx(math.log(2e-12), rel=1e-6)


# Capturing


def rows_at(folder: Path, examples: list[Example]) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(examples, folder / "rows.jsonl")
    return Artifact("rows", "r" * 64, folder / "rows.jsonl")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    settings = {"check": last_number, "rewrite": "math", "trains": ()}
    return data.dataset(skill="arithmetic", shift=0.0, size=12, seed=0, **settings).examples


BASE = Artifact("model", "m" * 64, CHECKPOINT)


def captured(out: Path, examples: list[Example], k: int = 7, temperature: float = 2.0, **further: Any) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    rows = rows_at(out.with_name(f"{out.name}-rows"), examples)
    asked = {"k": k, "temperature": temperature, "selfdata": {}, **ENCODED, **further}
    stage.capture(out, base=BASE, rows=rows, runtime=Runtime(quiet=True), **asked)
    return out


def asked_of(k: int = 7, temperature: float = 2.0) -> dict[str, Any]:
    tokenizer = load_tokenizer(CHECKPOINT)
    return origin(
        BASE.key, tokenizer, vocabulary=VOCABULARY, k=k, temperature=temperature, max_length=ENCODED["max_length"]
    )


@pytest.mark.parametrize("k", [7, VOCABULARY])
def test_what_is_captured_is_what_the_unpruned_model_says(tmp_path: Path, examples: list[Example], k: int) -> None:
    """Its own logits of each row by itself; and so they come back, in batches of another order and padding."""
    model, tokenizer = (
        load_model(CHECKPOINT, dtype="float32", attention="sdpa", device="cpu"),
        load_tokenizer(CHECKPOINT),
    )
    rows, _ = encode_all(tokenizer, examples, max_length=64)
    teacher = CachedTeacher([captured(tmp_path / "whole", examples, k)], asked_of(k))
    teacher.require(rows)
    for part in (rows, rows[::-2], rows[3:4]):
        batch = collate(part, padding_id(tokenizer))
        outputs = teacher(batch)
        coarse = outputs.head(outputs.hidden.flatten()[(batch.labels != -100).flatten()])
        with torch.no_grad():
            logits = [model(torch.tensor([row.input_ids])).logits[0] for row in part]
        places = [torch.tensor(row.labels) != -100 for row in part]
        expected = torch.cat([each[place] for each, place in zip(logits, places, strict=True)]) / 2
        logs = functional.log_softmax(expected.double(), -1)
        torch.testing.assert_close(coarse.logs[:, :k].double(), logs.gather(1, coarse.ids), atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(coarse.logs[:, :k].double(), logs.topk(k).values, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(
            coarse.logs.double().logsumexp(1), torch.zeros(len(logs)).double(), atol=1e-5, rtol=0
        )
    told = json.loads((tmp_path / "whole" / MANIFEST).read_text())["captured"]
    assert told["positions"] == sum(row.supervised for row in rows)
    assert k < VOCABULARY or told["mass"] == pytest.approx(told["positions"], rel=1e-5)


def test_neither_order_nor_batches_nor_chunks_change_what_is_captured(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = captured(tmp_path / "whole", examples)
    monkeypatch.setattr(stage, "CHUNK", 3)
    monkeypatch.setattr(stage, "text_spans", lambda lengths: [(at, at + 1) for at in range(len(lengths))])
    other = captured(tmp_path / "other", examples[::-1])
    first, second = (CachedTeacher([folder], asked_of()) for folder in (whole, other))
    assert first.places.keys() == second.places.keys() and len(first.places) == len(examples)
    for key, one in first.places.items():
        two = second.places[key]
        for number, file in enumerate(first.files[0]):
            mine, theirs = file[one.first :][: one.count], second.files[0][number][two.first :][: two.count]
            np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_no_row_gives_an_empty_capture(tmp_path: Path) -> None:
    """validation=0 holds out none."""
    folder = captured(tmp_path / "none", [])
    assert json.loads((folder / MANIFEST).read_text())["rows"] == []
    CachedTeacher([folder], asked_of()).require([])


def test_a_capture_of_something_else_is_refused_in_words(tmp_path: Path, examples: list[Example]) -> None:
    folder = captured(tmp_path / "whole", examples)
    wrong = asked_of(k=8, temperature=1.0) | {"tokenizer": "another"}
    with pytest.raises(UserError) as refused:
        CachedTeacher([folder], wrong)
    message = str(refused.value)
    assert (
        "teacher_cache (7 there, 8 here)" in message and "temperature of the loss (2.0 there, 1.0 here)" in message
    )
    assert "the tokenizer" in message and "the teacher (" not in message
    teacher = CachedTeacher([folder], asked_of())
    rows, _ = encode_all(load_tokenizer(CHECKPOINT), [Example("new", "what?", "that .")], max_length=64)
    with pytest.raises(UserError, match="1 rows, the first of them 'new'"):
        teacher.require(rows)
    with pytest.raises(UserError, match="a row of this batch"):
        teacher(collate(rows, 0))
    with pytest.raises(ValueError, match="hidden states"):
        teacher(collate(rows, 0), states=True)


def test_a_row_is_known_by_what_is_predicted_of_it_too() -> None:
    assert row_key([1, 2], [2, -100]) != row_key([1, 2], [-100, 2]) != row_key([1], [2])


# In a run

CACHED = ("loss=kd", "trainer.batch_size=4", "trainer.accumulate=2", "pruning.remove=2", "pruning=block_influence")


def settings(*overrides: str) -> dict[str, Any]:
    with composed(*SMALL, *overrides) as cfg:
        return resolve(cfg)


def recovery(store: Path, *overrides: str, log: Callable = lambda row: None) -> Run:
    return Run(Store(store), Runtime(quiet=True, log=log), method(settings(*CACHED, *overrides)))


def weights(run: Run) -> dict[str, torch.Tensor]:
    (file,) = run.student.path.glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The length of the difference between two students' weights."""
    assert one.keys() == other.keys()
    return float(torch.stack([(one[name] - other[name]).norm() for name in one]).norm())


def forbidden(*arguments: Any, **named: Any) -> None:
    raise AssertionError("a teacher was made")


@pytest.mark.runs
@pytest.mark.parametrize("asked", [("tuning=lora",), ("tuning=full", "trainer.learning_rate=1e-4"), ("loss=jsd",)])
def test_a_student_learns_from_it_as_from_the_model_itself(
    asked: tuple[str, ...], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the whole vocabulary kept it ends with the same weights but for rounding, which is little beside what
    keeping one token alone does; and no teacher was made for it."""
    live = weights(recovery(store, *asked))
    for name in ("SharedTeacher", "SeparateTeacher"):
        monkeypatch.setattr(f"sddx.students.teacher.{name}.__init__", forbidden)
    whole, one = (weights(recovery(store, *asked, f"teacher_cache={k}")) for k in (VOCABULARY, 1))
    assert 50 * apart(whole, live) < apart(one, live)


@pytest.mark.runs
def test_a_capture_and_a_training_that_were_killed_go_on_to_the_same(tmp_path: Path) -> None:
    """Killed in the second shard of rows, and then in the training: the same files as undisturbed."""

    class Killed(Exception):
        pass

    def killing(at: str, number: int) -> Callable[[dict], None]:
        seen: list[dict] = []

        def log(row: dict[str, Any]) -> None:
            seen.append(row)
            if sum(at in each for each in seen) == number:
                raise Killed

        return log

    asked = ("teacher_cache=16", "trainer.checkpoint_every=1")
    for moment in (("capture/rows", 2), ("train/loss", 3)):
        with pytest.raises(Killed):
            _ = recovery(tmp_path / "killed", *asked, log=killing(*moment)).student
    killed, whole = recovery(tmp_path / "killed", *asked), recovery(tmp_path / "whole", *asked)
    assert len(killed.captured) == 2
    for one, other in zip(killed.captured, whole.captured, strict=True):
        for name in (IDS, LOGS, MANIFEST):
            assert (one.path / name).read_bytes() == (other.path / name).read_bytes()
    first, second = weights(killed), weights(whole)
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.runs
def test_a_run_tells_what_was_captured_and_shares_it(store: Path, tmp_path: Path) -> None:
    """Of self-data too; another seed and cut of the same rows capture nothing; the same run builds nothing."""
    asked = ("loss=sdd_kd", "teacher_cache=4", f"store={store}", "trainer.budget=steps", "trainer.steps=2")
    summary = json.loads(run(settings(*asked), tmp_path / "run").read_text())
    told = summary["captured"]
    assert (told["k"], told["temperature"]) == (4, 1.0) and 0.9 < told["mass"] <= 1 and 0.5 < told["sure"] <= 1
    shown = dict(table.lines(summary))["captured of the teacher"]
    assert "of its probability in 4 tokens" in shown and len(summary["artifacts"]["capture"]) == 2
    assert (
        summary["choices"].get("loss")
        and {step.stage for step in look(settings(*asked)).steps if not step.present} == set()
    )
    other = look(settings(*asked, "seed=3", "pruning.remove=3"))
    assert "capture" in {step.stage for step in other.steps if step.present}
    assert "capture" not in {step.stage for step in other.steps if not step.present}


@pytest.mark.runs
@pytest.mark.usefixtures("quick_groups")
def test_several_devices_read_it_too(store: Path) -> None:
    one = weights(recovery(store, "teacher_cache=16"))
    shutil.rmtree(store / "train")
    two = weights(recovery(store, "teacher_cache=16", "trainer.strategy=ddp", "trainer.devices=2"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=2e-5, rtol=1e-3)


def test_runs_without_it_are_keyed_as_before() -> None:
    """Nothing of it stands in the recipe of a training, or of a report, that does not ask for it."""
    plan = look(settings("loss=kd"))
    recipes = {step.stage: step.recipe for step in plan.steps}
    assert "capture" not in recipes
    assert (
        "teacher_cache" not in recipes["train"]["spec"]
        and "teacher_cache" not in recipes["report"]["spec"]["choices"]
    )
    assert {entry["name"] for entry in recipes["train"]["inputs"]} == {"base", "cut", "held_out", "rows"}


REFUSED = {
    "no teacher": (["loss=sft"], "no term of the loss (cross_entropy) looks at one"),
    "hidden states": (["loss=squarehead"], "squarehead looks at its hidden states"),
    "two temperatures": (
        ["loss=kd", "+loss/term@loss.terms.reverse=kl_student_teacher", "loss.terms.reverse.loss.temperature=2"],
        "loss.terms.reverse.loss.temperature=2.0: a teacher is captured at one temperature",
    ),
    "more than there are": (["loss=kd", "teacher_cache=485"], "asks for more tokens than the vocabulary has (484)"),
    "nothing": (["loss=kd", "teacher_cache=0"], "teacher_cache=0 must be 1 or more"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_any_work(name: str) -> None:
    overrides, message = REFUSED[name]
    with pytest.raises(UserError) as refused:
        verify(settings("teacher_cache=64", *overrides))
    assert message in " ".join(str(each) for each in refused.value.args)


@pytest.mark.fast
def test_a_loss_says_at_which_temperature_it_compares() -> None:
    warm = Distilled(loss=partial(kl_teacher_student, temperature=2))
    assert warm.temperature == 2.0 and Distilled(loss=kl_teacher_student).temperature == 1.0
    assert Distilled(loss=lambda student, teacher: student).temperature == 1.0
    assert Objective(data="reference", terms={"a": warm}).temperature == 2.0


def test_a_plan_counts_it() -> None:
    """A pass over the rows, bytes on disk, and a training without a teacher: that of SFT."""
    live, cached, sft = (
        estimated(settings(*each, "tuning=full"))
        for each in (["loss=kd"], ["loss=kd", "teacher_cache=64"], ["loss=sft"])
    )
    parts = {part.stage: part for part in cached.parts()}
    assert parts["capture"].reading > 0 and "capture" not in {part.stage for part in live.parts()}
    assert parts["train"].reading == 0 < next(part for part in live.parts() if part.stage == "train").reading
    held = [peaks(each)["train"] for each in (sft, cached, live)]
    assert held[0] == held[1] < held[2] and peaks(cached)["capture"] > 0
    assert cached.disk()["captured of the teacher"] == pytest.approx(cached.answer * (48 + 8) * (64 * 8 + 4))


def test_it_can_be_rehearsed(tmp_path: Path) -> None:
    given = (
        "+experiment=llama_30L",
        "+rehearse=cpu",
        "loss=kd",
        "teacher_cache=100",
        f"store={tmp_path / 'store'}",
    )
    config = settings(*given)
    assert config["teacher_cache"] == 64 and any(line.startswith("tokens captured") for line in config["rehearse"])
    verify(config)
