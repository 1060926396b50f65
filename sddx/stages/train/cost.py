"""What training takes, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sddx.config.build import Settings, build
from sddx.config.shared import once
from sddx.errors import UserError
from sddx.estimate import memory, peaks
from sddx.estimate.costs import LEARNED, WRITTEN, Estimate, Part
from sddx.estimate.efforts import Effort
from sddx.estimate.texts import LONGEST
from sddx.models.load import DTYPES
from sddx.stages.distill.cost import TEMPLATE
from sddx.training.rollouts import Rollouts

NF4 = 0.28  # bytes of a weight in 4 bits with its scales, over its bytes in 16


def parts(estimate: Estimate) -> Iterator[Part]:
    """The student's training, where there is a term to train by."""
    if estimate.trains:
        about = [estimate.config[name] for name in LEARNED]
        yield estimate.part("train", about, estimate.pruned, _effort(estimate), **_step(estimate))


def of_all(estimate: Estimate, others: Sequence[Estimate]) -> Part:
    """The training of one student on the rows of these runs, as long as all of theirs."""
    about = [[each.config[name] for name in LEARNED] for each in others]
    efforts = sum(map(_effort, others), Effort())
    return estimate.part("train mixed", about, estimate.pruned, efforts, **_step(estimate))


def peak(estimate: Estimate) -> float | None:
    """Weights, a pass over a batch of the longest rows with its gradients, the two moments of what is trained, and
    one chunk of the head; or, where that is more, what the student holds while it writes. Rows are taken as long as
    max_length allows."""
    if not estimate.trains:
        return None
    trainer = estimate.config["trainer"]
    # The head's logits in the model's dtype, in float32, and the gradients of both.
    chunk = trainer["head_chunk"] * estimate.shape.vocab_size * 2 * (DTYPES[estimate.model["dtype"]].itemsize + 4)
    return peaks.share(estimate, _held(estimate)) + max(_passing(estimate) + chunk, _writing_bytes(estimate))


def remedies(estimate: Estimate, room: float) -> list[str]:
    """The overrides, each alone, with which training would fit into so many bytes; the largest smaller batch."""
    trainer, tuning = estimate.config["trainer"], estimate.config["tuning"]
    rows, steps = trainer["batch_size"], trainer["accumulate"]
    changes: list[tuple[str, Settings]] = [
        ("trainer.gradient_checkpointing=true", {"trainer": {**trainer, "gradient_checkpointing": True}}),
        ("tuning=qlora", {"tuning": {**tuning, "quantization": {}}}),
        *([("teacher_cache=64", {"teacher_cache": 64})] if _may_capture(estimate) else []),
    ]
    fitting = [name for name, change in changes if peaks.fits(peak(estimate.varied(**change)), room)]
    while rows > 1:
        rows, steps = rows // 2, steps * 2
        smaller = {**trainer, "batch_size": rows, "accumulate": steps}
        if peaks.fits(peak(estimate.varied(trainer=smaller)), room):
            return [*fitting, f"trainer.batch_size={rows} trainer.accumulate={steps}"]
    return fitting


def _may_capture(estimate: Estimate) -> bool:
    """Whether a teacher that runs beside the student could be read from disk."""
    objective = build(estimate.config["loss"])
    return objective.needs_teacher and not (objective.needs_states or objective.rollouts)


def _passing(estimate: Estimate) -> float:
    """What a pass over a batch of the longest rows holds, with its gradients."""
    config, trainer = estimate.config, estimate.config["trainer"]
    shape = trainer["batch_size"], config["max_length"]
    checkpointing = bool(trainer.get("gradient_checkpointing"))
    return once(
        ["learning", *estimate.cutting, config["tuning"], *shape, checkpointing],
        lambda: peaks.traced(memory.learning, estimate.student(), *shape, checkpointing=checkpointing),
    )


def _held(estimate: Estimate) -> float:
    """Weights of student and teacher, and the optimiser's moments, on one device."""
    unpruned, pruned = estimate.unpruned.weight_bytes, estimate.pruned.weight_bytes
    each = DTYPES[estimate.model["dtype"]].itemsize
    needed, shared = estimate.needs_teacher, _shares_teacher(estimate)
    teacher = estimate.teacher.weight_bytes if needed and not shared else 0
    if estimate.is_full:
        return pruned + teacher + 2 * each * estimate.trained
    frozen = unpruned if needed and shared else pruned
    head = 2 * estimate.unpruned.head * each  # stays in its dtype, as do embeddings
    quantised = "quantization" in estimate.config["tuning"]
    # The adapter and its moments are float32.
    return (head + NF4 * (frozen - head) if quantised else frozen) + teacher + 3 * 4 * estimate.trained


def _shares_teacher(estimate: Estimate) -> bool:
    """Whether the teacher is in the student's own weights, and not a model beside it (see `run`)."""
    cut = estimate.cut
    twins = bool(cut.no_attention or cut.no_feedforward or estimate.fit)
    return not (estimate.is_full or estimate.config["teacher"] or (twins and peaks.in_shards(estimate)))


def _examples(estimate: Estimate) -> float:
    """Examples that are trained on. Raises UserError for a budget without its number."""
    trainer = estimate.config["trainer"]
    if trainer["budget"] != "examples" and trainer[trainer["budget"]] is None:
        raise UserError(f"trainer.budget={trainer['budget']} needs trainer.{trainer['budget']}=...")
    if trainer["budget"] == "steps":
        return trainer["steps"] * trainer["batch_size"] * trainer["accumulate"]
    if trainer["budget"] == "tokens":
        return trainer["tokens"] / max(estimate.answer, 1)
    return trainer["epochs"] * estimate.rows.count


def _validations(estimate: Estimate, examples: float) -> float:
    """Times that the held-out rows are read: every so many steps, and at the end."""
    trainer = estimate.config["trainer"]
    steps = -(-examples // (trainer["batch_size"] * trainer["accumulate"]))
    return -(-steps // (trainer.get("validate_every") or max(steps, 1)))


def _effort(estimate: Estimate) -> Effort:
    """Backward is as much again for the states, and once more for weights that are trained themselves; a block that
    is checkpointed is computed twice, as is the head where a batch has more labels than one chunk. Held-out rows
    only go forward. What is read is for the teacher."""
    trainer, examples = estimate.config["trainer"], _examples(estimate)
    size, teacher = estimate.pruned, estimate.teacher
    answer = _answer(estimate)
    row = min(estimate.rows.prompt + answer, estimate.config["max_length"])
    labels = min(answer, row)
    held_out = estimate.config["validation"] * _validations(estimate, examples)
    again = trainer["batch_size"] * labels > trainer["head_chunk"]
    passes, checkpointed = 2 + estimate.is_full, bool(trainer.get("gradient_checkpointing"))
    bodies, heads = examples * (passes + checkpointed) + held_out, examples * (passes + again) + held_out
    adapter = 0 if estimate.is_full else 2 * estimate.trained * (examples * (3 + checkpointed) + held_out)
    learned = row * (bodies * size.body(row) + adapter) + heads * 2 * labels * size.head
    shown, judged = examples + held_out, examples * (1 + again) + held_out
    looked_at = row + _guidance(estimate)
    read = shown * looked_at * teacher.body(looked_at) + judged * 2 * labels * teacher.head
    effort = Effort(learning=learned, reading=read if estimate.needs_teacher else 0, trained=row * examples)
    return effort + _writing(estimate, examples)


def _answer(estimate: Estimate) -> float:
    """Tokens of an answer that is trained on, the student's own among them."""
    share = rollouts.share if (rollouts := _rollouts(estimate)) else 0
    return (1 - share) * estimate.answer + share * _rollout(estimate)


def _rollouts(estimate: Estimate) -> Rollouts | None:
    written: Rollouts | None = build(estimate.config["loss"]).rollouts
    return written


def _rollout(estimate: Estimate) -> float:
    """Tokens of an answer of the student's own, a mean over the training in which they grow."""
    rollouts = _rollouts(estimate)
    return min(WRITTEN * estimate.rows.answer, (rollouts.first + rollouts.last) / 2) if rollouts else 0


def _guidance(estimate: Estimate) -> float:
    """Tokens that a teacher reads of a row more than the student."""
    rollouts = _rollouts(estimate)
    return TEMPLATE + estimate.rows.answer if rollouts and rollouts.rewrite else 0


def _writing(estimate: Estimate, examples: float) -> Effort:
    """The student's answers before each step; a batch of them waits for its longest."""
    if (rollouts := _rollouts(estimate)) is None:
        return Effort()
    trainer, prompt = estimate.config["trainer"], estimate.rows.prompt
    rows = trainer["batch_size"] * trainer["accumulate"]
    longest = min(LONGEST * estimate.rows.answer, (rollouts.first + rollouts.last) / 2)
    batches = -(-rollouts.share * rows // rollouts.batch_size)
    return Effort(
        reading=rollouts.share * examples * prompt * estimate.pruned.prefill(prompt),
        steps=longest * batches * -(-examples // rows),
        read=rollouts.share * examples * prompt,
        written=rollouts.share * examples * _rollout(estimate),
    )


def _step(estimate: Estimate) -> dict[str, float]:
    """Rows that the student writes side by side, and the tokens that a step of it attends to, over all of them."""
    if (rollouts := _rollouts(estimate)) is None:
        return {}
    rows = _side_by_side(estimate, rollouts)
    return {"rows": rows, "cached": rows * (estimate.rows.prompt + _rollout(estimate) / 2)}


def _side_by_side(estimate: Estimate, rollouts: Rollouts) -> float:
    trainer = estimate.config["trainer"]
    return min(rollouts.batch_size, rollouts.share * trainer["batch_size"] * trainer["accumulate"])


def _writing_bytes(estimate: Estimate) -> float:
    """The memory of rows that are written side by side, and what their next tokens are drawn from, in float64."""
    if (rollouts := _rollouts(estimate)) is None:
        return 0
    row = estimate.config["max_length"] * estimate.pruned.cache_bytes + 4 * 8 * estimate.shape.vocab_size
    return _side_by_side(estimate, rollouts) * row
