"""Laws of answers that the student writes while it is trained: whose they are, where they end, what is learned."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import SMALL, composed
from families import VOCABULARY, build
from test_estimate import configured
from test_training import ADAPTER, CUT, Killed, Log, examples, pruned, weights

import sddx
from sddx.compression.compressed import compress
from sddx.compression.remove import Removal
from sddx.config import resolve
from sddx.data.encode import IGNORED, Encoded, collate, prompts_of
from sddx.data.templates import rewriting_prompt
from sddx.errors import UserError
from sddx.estimate.costs import Part
from sddx.models.load import load_tokenizer
from sddx.models.outputs import run as forward
from sddx.parallel.distributed import rank
from sddx.parallel.launch import launch
from sddx.records import Cut, Example
from sddx.runtime import Runtime
from sddx.stages.cost import estimated
from sddx.stages.train.run import _encoded
from sddx.students.teacher import SharedTeacher
from sddx.train import run
from sddx.training.batches import plan
from sddx.training.fit import Fit
from sddx.training.head import token_loss
from sddx.training.losses import cross_entropy, jsd_beta, kl_teacher_student
from sddx.training.objective import Distilled, Layerwise, Objective, Supervised
from sddx.training.rollouts import Rollouts
from sddx.training.tuning import full
from sddx.training.writer import Writer

JSD = {"jsd_beta": Distilled(loss=partial(jsd_beta, beta=0.5))}
END, PAD, ROOM = 1, 0, 40
SHORT = {"first": 3, "last": 12}


def writer(student: Any, rollouts: Rollouts, rows: list[Encoded] | None = None, **more: Any) -> Writer:
    """Writes answers to these rows for a student."""
    form = {"max_length": ROOM, "ends": [END], "pad_id": PAD} | more
    return Writer(student, rollouts, rows or examples(12), 0, **form)


def train(out: Path, rollouts: Rollouts | None, *, rows: list[Encoded] | None = None, log: Any = None,
          tune: Any = ADAPTER, dtype: Any = torch.float64, held_out: int = 0, terms: Any = JSD,
          runtime: Runtime | None = None, **settings: Any) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """A student trained on its own answers, and what fit said; without rollouts on those of the rows."""
    out.mkdir(exist_ok=True)
    student, teacher = pruned(tune, dtype)
    rows = rows or examples(12)
    objective = Objective(data="reference", terms=terms, rollouts=rollouts)
    writes = writer(student, rollouts, rows) if rollouts else None
    runtime = runtime or Runtime(quiet=True, log=log or (lambda row: None))
    fit = Fit(**{"batch_size": 4, "log_every": 1, "epochs": 2} | settings)
    held = examples(held_out, seed=1)
    report = fit(student, teacher, objective, CUT, rows, held, PAD, 0, out, runtime, writes)
    return student, report


def written(student: Any, rollouts: Rollouts, index: int = 0, steps: int = 1, **more: Any) -> list[list[int]]:
    """What a student writes to rows in one step: labels, row by row in their order."""
    rows = examples(12)
    (step,) = plan(rows, 0, batch_size=12, epochs=1)
    _, (batch,) = writer(student, rollouts, rows, **more)(step, [collate(rows, PAD)], index, steps)
    answers = [labels[labels != IGNORED].tolist() for labels in batch.labels]
    return [answer for _, answer in sorted(zip(step.micro_batches[0], answers, strict=True))]


def alone(student: Any, row: Encoded, new: int) -> list[int]:
    """What transformers writes greedily after the row's prompt, up to the end token."""
    ids = torch.tensor([row.prompt])
    asked = {"max_new_tokens": new, "do_sample": False, "eos_token_id": END, "pad_token_id": PAD}
    made = student.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)
    return made[0, len(row.prompt) :].tolist()


# What is written


def test_without_a_temperature_it_is_greedy_decoding():
    """And so close to a temperature of 0; at 1 it is not."""
    student, _ = pruned(full, torch.float64)
    expected = [alone(student.eval(), row, 12) for row in examples(12)]
    assert len({len(answer) for answer in expected}) > 1  # some end
    for temperature in (0.0, 1e-4):
        rollouts = Rollouts(temperature=temperature, repeats=0, first=12, last=12)
        assert written(student, rollouts) == expected
    assert written(student, Rollouts(repeats=0, first=12, last=12)) != expected


def test_samples_have_the_students_own_distribution():
    """The first tokens of many rows with one prompt, against the student's probabilities (chi-square)."""
    student, _ = pruned(full, torch.float64)
    number, prompt = 3000, [5, 9, 23]
    rows = [Encoded("", [*prompt, 7], [IGNORED, IGNORED, 7, IGNORED], 1)] * number
    (step,) = plan(rows, 0, batch_size=number, epochs=1)
    make = writer(student, Rollouts(first=1, last=1, temperature=2.0, batch_size=500), rows)
    _, (batch,) = make(step, [collate(rows, PAD)], 0, 1)
    with torch.no_grad():
        chances = (student(torch.tensor([prompt])).logits[0, -1] / 2.0).softmax(-1)
    counts = batch.labels[:, 2].bincount(minlength=VOCABULARY)
    assert counts.sum() == number
    statistic = ((counts - number * chances) ** 2 / (number * chances)).sum().item()
    assert statistic < 63 + 4 * (2 * 63) ** 0.5


def test_a_rollout_is_a_function_of_seed_step_and_row():
    """Not of its neighbours, nor of how a step is cut; another step or seed draws another."""
    student, _ = pruned(full, torch.float64)
    rollouts = Rollouts(first=12, last=12)
    first = written(student, rollouts)
    assert first == written(student, replace(rollouts, batch_size=5)) != written(student, rollouts, index=1)
    rows = examples(12)
    for size in (3, 4):
        (step,) = plan(rows, 0, batch_size=size, accumulate=12 // size, epochs=1)
        batches = [collate([rows[row] for row in part], PAD) for part in step.micro_batches]
        _, parts = writer(student, rollouts, rows)(step, batches, 0, 1)
        for members, part in zip(step.micro_batches, parts, strict=True):
            for row, labels in zip(members, part.labels, strict=True):
                assert labels[labels != IGNORED].tolist() == first[row]


def test_lengths_grow_from_the_first_step_to_the_last():
    """On a line, both ends reached; one step alone has the first."""
    rollouts = Rollouts(first=3, last=11)
    lengths = [rollouts.length(step, 5) for step in range(5)]
    assert lengths == [3, 5, 7, 9, 11] and rollouts.length(0, 1) == 3
    student, _ = pruned(full, torch.float64)
    for step, most in enumerate(lengths):
        answers = written(student, replace(rollouts, repeats=0), step, 5)
        assert max(map(len, answers)) == most
        assert all(len(answer) == most or answer[-1] == END for answer in answers)


def test_prompt_and_answer_keep_within_the_length_of_rows():
    """Each row by its own prompt, also by transformers' own generate."""
    student, _ = pruned(full, torch.float64)
    rollouts = Rollouts(first=30, last=30, repeats=0, temperature=0.0)
    rows = examples(12)
    make = writer(student, rollouts, rows, max_length=14)
    (step,) = plan(rows, 0, batch_size=12, epochs=1)
    totals, (batch,) = make(step, [collate(rows, PAD)], 0, 1)
    lengths = batch.attention_mask.sum(-1)
    ended = (batch.input_ids == END).any(-1)
    assert ((lengths == 14) | ended).all() and lengths.max() == 14
    assert totals.totals.attended == lengths.sum() and totals.totals.labelled == (batch.labels != IGNORED).sum()
    make.batchable = False
    _, (slow,) = make(step, [collate(rows, PAD)], 0, 1)
    assert torch.equal(slow.input_ids, batch.input_ids) and torch.equal(slow.labels, batch.labels)


def test_the_first_label_is_the_first_token_written_and_an_end_token_is_one():
    """The prompt is the row's and carries no label but the first token's; what ended carries its end token, what
    was cut off none."""
    row = Encoded("", [5, 6, 7, 8, 9], [IGNORED, IGNORED, 8, 9, IGNORED], 2)
    assert row.prompt == [5, 6, 7]
    ended, cut_off = row.answered([20, 21, END]), row.answered([20, 21])
    assert (ended.input_ids, ended.supervised) == ([5, 6, 7, 20, 21, END], 3)
    assert ended.labels == [IGNORED, IGNORED, 20, 21, END, IGNORED]
    assert cut_off.labels == [IGNORED, IGNORED, 20, 21, IGNORED] and END not in cut_off.input_ids
    student, _ = pruned(full, torch.float64)
    answers = written(student, Rollouts(temperature=0.0, first=12, last=12, repeats=0))
    assert any(answer[-1] == END for answer in answers) and any(END not in answer for answer in answers)


REPEATING = {
    "one token again and again": ([3, 4, 7, 7, 7, 7, 7], 3),
    "a run of tokens, the last time broken off": ([9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1], 4),
    "from its very beginning": ([1, 2] * 5, 2),
    "too few times": ([9, 1, 2, 3, 1, 2, 3, 1, 2, 3], 10),
    "not at its end": ([7, 7, 7, 7, 7, 7, 8], 7),
    "nothing": ([1, 2, 3, 4, 5, 6], 6),
}


@pytest.mark.parametrize("name", REPEATING)
def test_what_repeats_itself_is_cut_after_the_first_time(name: str):
    tokens, kept = REPEATING[name]
    assert Rollouts(repeats=4).kept(tokens) == kept
    assert Rollouts(repeats=0).kept(tokens) == len(tokens)


def test_what_ended_by_itself_is_not_cut():
    """An answer of one token four times and an end is whole; its tokens are counted as they were written."""
    student, _ = pruned(full, torch.float64)
    make = writer(student, Rollouts())
    whole, stuck = make._rollout(0, [7, 7, 7, 7, END]), make._rollout(0, [7] * 9)
    assert (whole.row.supervised, whole.tokens, whole.ended, whole.repeating) == (5, 5, True, False)
    assert (stuck.row.supervised, stuck.tokens, stuck.ended, stuck.repeating) == (1, 9, False, True)


# What is learned


def test_a_share_of_nothing_is_the_divergence_on_the_rows_answers(tmp_path):
    """Bit for bit, dropout and all."""
    ours, report = train(tmp_path / "0", Rollouts(share=0.0), held_out=3)
    theirs, expected = train(tmp_path / "none", None, held_out=3)
    assert all(torch.equal(value, weights(theirs)[name]) for name, value in weights(ours).items())
    tally = report.pop("rollouts")
    assert tally["rows"] == tally["tokens"] == 0
    assert report["train"].pop("written_tokens") == 0
    clock = {"tokens_per_second": 0, "seconds": 0}
    assert report | clock == expected | clock


def test_a_share_of_the_rows_is_written(tmp_path):
    """About that share, drawn anew in each step; the others keep their answers."""
    rows = examples(40)
    student, _ = pruned(full, torch.float64)
    make = writer(student, Rollouts(share=0.3, temperature=0.0, **SHORT), rows)
    (step,) = plan(rows, 0, batch_size=40, epochs=1)
    own = collate([rows[row] for row in step.micro_batches[0]], PAD)
    kept = []
    for index in range(20):
        _, (batch,) = make(step, [own], index, 20)
        answers = [labels[labels != IGNORED].tolist() for labels in batch.labels]
        mine = [labels[labels != IGNORED].tolist() for labels in own.labels]
        kept.append([ours == theirs for ours, theirs in zip(answers, mine, strict=True)])
    assert 0.2 < make.tally.rows / 800 < 0.4 and sum(map(sum, kept)) >= 800 - make.tally.rows
    assert len({tuple(each) for each in kept}) == 20


def test_an_untouched_student_is_its_teacher():
    """No block removed and an adapter that does nothing yet: the divergence on rollouts is 0."""
    whole = Cut((0, 1, 2, 3), 4)
    made = compress(build("llama", blocks=4).double(), [Removal(whole)])
    made.model = partial(ADAPTER, dropout=0.0)(made.model, 0)
    teacher = SharedTeacher(made)
    rows = examples(12)
    (step,) = plan(rows, 0, batch_size=12, epochs=1)
    step, (batch,) = writer(made.model, Rollouts(), rows)(step, [collate(rows, PAD)], 0, 1)
    student = forward(made.model, batch.input_ids, batch.attention_mask)
    loss, _ = token_loss(JSD, student, teacher(batch), batch.labels, divisor=1)
    assert step.totals.labelled > 12 and abs(loss.item()) < 1e-12


@pytest.mark.parametrize("tune", [ADAPTER, full], ids=["lora", "full"])
def test_how_a_step_is_cut_changes_nothing(tmp_path, tune):
    """2 x 4 and 4 x 2 accumulation end with the weights of 1 x 8: a row's answer does not hang on its neighbours,
    and terms are divided by the labels that were written."""
    tune = tune if tune is full else partial(tune, dropout=0.0)
    settings: dict[str, Any] = dict(tune=tune, rows=examples(13))
    whole, report = train(tmp_path / "1x8", Rollouts(**SHORT), batch_size=8, **settings)
    before = weights(pruned(tune, torch.float64)[0])
    for size in (2, 4):
        cut_up, again = train(tmp_path / str(size), Rollouts(**SHORT), batch_size=size, accumulate=8 // size,
                              head_chunk=3, **settings)  # fmt: skip
        torch.testing.assert_close(weights(cut_up), weights(whole), rtol=0, atol=1e-9)
        assert again["train"] == pytest.approx(report["train"], rel=1e-9)
    assert max((value - before[name]).abs().max() for name, value in weights(whole).items()) > 1e-4


@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_resuming_changes_nothing(tmp_path, killed_after):
    """The same rows of metrics and weights bit for bit, and what was written is counted once."""
    settings: dict[str, Any] = dict(checkpoint_every=2, held_out=5, validate_every=2, keep="best",
                                    dtype=torch.float32, learning_rate=1e-2)  # fmt: skip
    (tmp_path / "whole").mkdir()
    log = Log(tmp_path / "whole")
    whole, report = train(tmp_path / "whole", Rollouts(**SHORT), log=log, **settings)
    (out := tmp_path / "killed").mkdir()
    with pytest.raises(Killed):
        train(out, Rollouts(**SHORT), log=Log(out, kill_at=killed_after + 1), **settings)
    second = Log(out)
    resumed, again = train(out, Rollouts(**SHORT), log=second, **settings)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert second.rows() == log.rows()
    for each in (report, again):
        clock = each["rollouts"].pop("seconds"), each.pop("seconds"), each.pop("tokens_per_second")
        assert 0 < clock[0] < clock[1]
    assert again == report and report["rollouts"]["rows"] == report["examples"] == 24


def test_what_was_written_is_counted(tmp_path):
    """Labels that are trained are the tokens written but for those cut because they repeat."""
    _, report = train(tmp_path / "all", Rollouts(repeats=0, **SHORT))
    tally = report["rollouts"]
    assert report["supervised_tokens"] == tally["tokens"] == report["train"]["written_tokens"]
    assert 0 < tally["ended"] < tally["rows"] == 24 and tally["repeating"] == 0
    _, cut = train(tmp_path / "cut", Rollouts(repeats=2, temperature=0.0, **SHORT))
    assert cut["supervised_tokens"] < cut["rollouts"]["tokens"] and cut["rollouts"]["repeating"] > 0


def test_mixed_precision_learns_too(tmp_path):
    """What autocast has cast while the student wrote, without gradients, is not taken for weights of the step:
    the gradient of the first step is that of float32 but for rounding."""
    norms = []
    for precision in ("32", "bf16"):
        settings: dict[str, Any] = dict(
            budget="steps", steps=1, precision=precision, dtype=torch.float32, tune=full
        )
        rollouts = Rollouts(first=1, last=1, temperature=0.0)
        norms.append(train(tmp_path / precision, rollouts, **settings)[1]["train"]["gradient_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.1) and norms[1] != norms[0]


def test_it_learns_what_the_teacher_would_say(tmp_path):
    """The divergence on the student's own answers falls."""
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = dict(budget="steps", steps=40, learning_rate=1e-2, log=rows.append)
    train(tmp_path, Rollouts(first=8, last=8), tune=partial(ADAPTER, dropout=0.0), **settings)
    losses = [row["train/jsd_beta"] for row in rows]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def trained_together(out: Path, *, runtime: Runtime, **settings: Any) -> None:
    """What each of several processes runs; the first keeps the weights and what fit said."""
    student, report = train(out, Rollouts(**SHORT), rows=examples(22), runtime=runtime, **settings)
    if rank() == 0:
        torch.save(weights(student), out / "weights.pt")
        (out / "report.json").write_text(json.dumps(report))


@pytest.mark.usefixtures("quick_groups")
def test_two_processes_write_and_learn_what_one_does(tmp_path):
    """Each writes for its own micro-batches, of which the last step of an epoch has one too few, and all is counted
    once."""
    settings: dict[str, Any] = dict(tune=partial(ADAPTER, dropout=0.0), batch_size=2, accumulate=4)
    found = []
    for devices in (1, 2):
        (out := tmp_path / str(devices)).mkdir()
        several = {"strategy": "ddp", "devices": 2} if devices == 2 else {}
        work = partial(trained_together, out, **settings, **several)
        launch(work, devices, Runtime(quiet=True)) if several else work(runtime=Runtime(quiet=True))
        found.append((torch.load(out / "weights.pt"), json.loads((out / "report.json").read_text())))
    (ours, report), (theirs, again) = found
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert again["supervised_tokens"] == report["supervised_tokens"]
    assert again["attended_tokens"] == report["attended_tokens"]
    for each in (report, again):
        each["rollouts"].pop("seconds")
    assert again["rollouts"] == report["rollouts"] and report["rollouts"]["rows"] == 44


# A teacher that reads the reference


CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"
SUM = Example("1", "What is 2 plus 3?", "2 plus 3 makes 5.")


def test_a_guided_teacher_is_shown_the_reference_as_self_data_is_written():
    """The student's prompt stays the row's own, and the answer and its labels are the same."""
    tokenizer = load_tokenizer(CHECKPOINT)
    encode = partial(_encoded, tokenizer, max_length=200, context=None)
    (plain,), _ = encode(Rollouts(), [SUM])
    (guided,), _ = encode(Rollouts(rewrite="tiny"), [SUM])
    own, asked = prompts_of(
        tokenizer, [SUM, replace(SUM, prompt=rewriting_prompt("tiny", SUM.prompt, SUM.response))]
    )
    assert plain == replace(guided, shown=()) and guided.prompt == own and guided.shown == asked
    answer = guided.input_ids[len(own) :]
    assert guided.for_teacher().input_ids == [*asked, *answer]
    assert guided.for_teacher().labels[len(asked) - 1 : -1] == answer


def test_a_rewriting_prompt_without_room_for_an_answer_is_dropped_and_counted():
    """Where the longest rollout, or the reference, would not fit behind it in the model's context."""
    encode = partial(
        _encoded, load_tokenizer(CHECKPOINT), Rollouts(rewrite="tiny", first=1, last=30), max_length=200
    )
    (row,), _ = encode([SUM], context=None)
    assert encode([SUM], context=len(row.shown) + 30) == ([row], 0)
    assert encode([SUM], context=len(row.shown) + 29) == ([], 1)


def guided_rows(number: int) -> list[Encoded]:
    """Rows whose teacher reads another, longer prompt."""
    dice = random.Random(5)
    return [replace(row, shown=[dice.randrange(2, VOCABULARY) for _ in range(dice.randint(4, 20))])
            for row in examples(number)]  # fmt: skip


def test_a_guided_teacher_reads_its_prompt_and_the_same_answer():
    """Its logits at the labels are those of a pass over its own prompt and the answer, row by row."""
    student, teacher = pruned(ADAPTER, torch.float64)
    rows = guided_rows(12)
    (step,) = plan(rows, 0, batch_size=12, epochs=1)
    _, (batch,) = writer(student, Rollouts(rewrite="tiny", **SHORT), rows)(step, [collate(rows, PAD)], 0, 1)
    shown = batch.for_teacher
    assert torch.equal(batch.labels[batch.labels != IGNORED], shown.labels[shown.labels != IGNORED])
    outputs = teacher(shown)
    made = outputs.head(outputs.hidden)
    for place, number in enumerate(step.micro_batches[0]):
        answer = batch.labels[place][batch.labels[place] != IGNORED].tolist()
        assert batch.input_ids[place, : len(rows[number].prompt)].tolist() == rows[number].prompt
        with torch.no_grad(), teacher.unpruned() as unpruned:
            whole = unpruned(torch.tensor([[*rows[number].shown, *answer]])).logits[0]
        expected = whole[len(rows[number].shown) - 1 : -1]
        torch.testing.assert_close(made[place][shown.labels[place] != IGNORED], expected, rtol=0, atol=1e-9)


def test_the_divergence_is_taken_token_by_token_against_what_the_guided_teacher_says():
    """Over a whole batch, in chunks, against a loop over rows."""
    student, teacher = pruned(ADAPTER, torch.float64)
    student.eval()
    rows = guided_rows(7)
    batch = collate(rows, PAD)
    terms = {"kl": Distilled(loss=kl_teacher_student)}
    judged, read = teacher(batch.for_teacher), forward(student, batch.input_ids, batch.attention_mask)
    form = {"divisor": 1, "chunk": 4, "teacher_labels": batch.for_teacher.labels}
    _, sums = token_loss(terms, read, judged, batch.labels, **form)
    total = 0.0
    for row in rows:
        with torch.no_grad():
            mine = student(torch.tensor([row.input_ids])).logits[0][len(row.prompt) - 1 :]
            with teacher.unpruned() as unpruned:
                answer = row.input_ids[len(row.prompt) :]
                theirs = unpruned(torch.tensor([[*row.shown, *answer]])).logits[0][len(row.shown) - 1 :]
        total += kl_teacher_student(mine[: row.supervised], theirs[: row.supervised]).sum().item()
    assert sums["kl"].item() == pytest.approx(total, rel=1e-9)


def test_a_guided_training_is_another_and_resumes_alike(tmp_path):
    """Of all rows, in training and held out; the plain rows give other weights."""
    ours, report = train(tmp_path / "guided", Rollouts(rewrite="tiny", **SHORT), rows=guided_rows(12))
    plain, _ = train(tmp_path / "plain", Rollouts(**SHORT))
    assert not all(torch.equal(value, weights(plain)[name]) for name, value in weights(ours).items())
    assert report["rollouts"]["rows"] == 24


# What does not go together


def test_what_does_not_go_with_rollouts_is_refused():
    """Terms on labels; with a guided teacher terms on states, and rows that carry no references."""
    rollouts, guided = Rollouts(), Rollouts(rewrite="tiny")
    labels = {**JSD, "ce": Supervised(loss=cross_entropy)}
    with pytest.raises(UserError, match=r"loss.terms.ce learns labels.*~loss.terms.ce"):
        Objective(data="reference", terms=labels, rollouts=rollouts)
    with pytest.raises(UserError, match="no terms"):
        Objective(data="reference", terms={}, rollouts=rollouts)
    states = {"layers": Layerwise(loss=kl_teacher_student)}
    Objective(data="reference", terms=states, rollouts=rollouts)
    with pytest.raises(UserError, match=r"loss.terms.layers compares states"):
        Objective(data="reference", terms=states, rollouts=guided)
    with pytest.raises(UserError, match=r"loss.data=self"):
        Objective(data="self", terms=JSD, rollouts=guided)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first": 9, "last": 8}, "loss.rollouts.first=9 is more than loss.rollouts.last=8"),
        ({"repeats": 1}, "loss.rollouts.repeats=1"),
        ({"rewrite": "tinny"}, "rewriting template 'tinny'"),
    ],
)
def test_settings_of_rollouts_are_checked(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        Rollouts(**settings)


# From the command line


def job(out: Path, store: Path, *overrides: str) -> dict[str, Any]:
    with composed(*SMALL, f"store={store}", *overrides, out=out) as cfg:
        return json.loads(run(resolve(cfg), out).read_text())


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["trainer.budget=tokens", "trainer.tokens=500"], ["trainer.budget=steps", "supervised_tokens"]),
        (["trainer.strategy=fsdp", "trainer.devices=2", "trainer.accumulate=2"], ["trainer.strategy=ddp"]),
        (["loss.rollouts.first=200"], ["loss.rollouts.last=128"]),
        (["teacher_cache=8"], ["teacher_cache", "what the student writes"]),
        (["+loss/term@loss.terms.cross_entropy=cross_entropy"], ["~loss.terms.cross_entropy"]),
    ],
)
def test_mistakes_are_told_before_any_work(tmp_path: Path, overrides: list[str], parts: list[str]):
    with pytest.raises(UserError) as caught:
        job(tmp_path, tmp_path / "store", "loss=on_policy", *overrides)
    assert all(part in str(caught.value) for part in parts)


def test_a_plan_counts_what_the_student_writes():
    """Tokens of the part of its rows that it writes, steps of decoding, and what a guided teacher reads more."""
    small = ("trainer.budget=steps", "trainer.steps=10", "loss.rollouts.first=4", "loss.rollouts.last=8")

    def planned(*given: str) -> Part:
        (part,) = (each for each in estimated(configured(*small, *given)).parts() if each.stage == "train")
        return part

    plain, half = planned("loss=on_policy"), planned("loss=on_policy", "loss.rollouts.share=0.5")
    guided, off = planned("loss=on_policy_guided"), planned("loss=on_policy", "loss.rollouts.share=0")
    assert plain.tokens["written"] == 10 * 16 * 6 == 2 * half.tokens["written"] and plain.steps == 10 * 6
    assert guided.reading > plain.reading and guided.tokens["written"] == plain.tokens["written"]
    jsd = configured("trainer.budget=steps", "trainer.steps=10", "loss=jsd", "~loss.terms.cross_entropy")
    (same,) = (each for each in estimated(jsd).parts() if each.stage == "train")
    assert (off.reading, off.learning, off.steps, off.tokens) == (same.reading, same.learning, 0, same.tokens)


def test_rollouts_can_be_rehearsed(tmp_path: Path):
    """As short as all other answers, and said so."""
    given = ("+experiment=llama_30L", "+rehearse=cpu", "loss=on_policy_guided", f"store={tmp_path / 'store'}")
    with composed(*given) as cfg:
        config = resolve(cfg)
    rollouts, tokens = config["loss"]["rollouts"], config["generation"]["max_new_tokens"]
    assert rollouts["last"] == tokens and rollouts["first"] <= tokens
    assert any(line.startswith("rollouts:") for line in config["rehearse"])


@pytest.mark.runs
@pytest.mark.parametrize("loss", ["on_policy", "on_policy_guided"])
def test_a_run_says_what_was_written(loss: str, tmp_path: Path, shared_store: Path):
    """Tokens and seconds in the summary and under the table; other arms say nothing of the kind."""
    lengths = ["loss.rollouts.first=4", "loss.rollouts.last=12", "loss.rollouts.repeats=0"]
    summary = job(tmp_path, shared_store, f"loss={loss}", *lengths)
    rollouts = summary["rollouts"]
    assert rollouts["rows"] == summary["examples"] == 48 and rollouts["seconds"] > 0
    assert rollouts["tokens"] == summary["supervised_tokens"] > 0
    assert f"{rollouts['tokens']:,} tokens" in (tmp_path / "table.md").read_text()
