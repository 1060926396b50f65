"""How much every stage computes: FLOPs, steps of decoding, tokens. Stages that run no model on many tokens are left
out: prepare, prune, written, overlap and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from sddx.compression.fit import UNEXPLAINED
from sddx.data.encode import TEXT_BATCH
from sddx.estimate.skeleton import Size
from sddx.estimate.texts import LONGEST, items_of, limited, request

if TYPE_CHECKING:
    from sddx.estimate.costs import Estimate

MOST_WRITTEN = 256  # tokens of an answer where nothing else is said; lm-eval's own


@dataclass(frozen=True)
class Effort:
    """FLOPs of reading and of learning, steps of decoding, and tokens by kind."""

    reading: float = 0.0
    learning: float = 0.0
    steps: float = 0.0
    read: float = 0.0
    written: float = 0.0
    trained: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        return Effort(*(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Effort:
        return Effort(*(times * amount for amount in astuple(self)))


def scoring(estimate: Estimate) -> Effort:
    """All metrics that are asked for. A backward pass is twice a forward one."""
    texts, size, total = estimate.calibration, estimate.unpruned, Effort()
    for metric, work in estimate.scored:
        length = texts.mean if work.alone else texts.padded
        total += Effort(
            reading=length * work.body * size.body(length) + texts.mean * work.head * 2 * size.head,
            learning=3 * length * work.learned * (size.body(length) + 2 * size.head),
            read=texts.mean * (work.body + work.learned),
        )
        if work.models:
            value = metric.value
            of = value.data_dir, value.side
            total += judging(size, value.tasks, value.limit, value.batch_size, value.shots, of=of) * work.models
    return total


def patching(estimate: Estimate) -> Effort:
    """One pass over all texts, another over the first batches to see what is left unexplained, and for a patch that
    is trained one an epoch for each gap, beside which a retrained block is run and learns."""
    texts, size, fit = estimate.calibration, estimate.unpruned, estimate.fit
    epochs = fit.epochs * estimate.gaps
    read = (1 + epochs) * texts.count + min(UNEXPLAINED * TEXT_BATCH, texts.count)
    each = texts.padded * size.body(texts.padded)
    learned = epochs * texts.count if fit.reads == "preceding" else 0
    return Effort(reading=read * each, learning=3 * learned * each / size.blocks, read=read * texts.mean)


def writing(estimate: Estimate, rows: int) -> Effort:
    """The unpruned model's answers to a shard of rows; a batch waits for its longest."""
    shown, most = estimate.shown, estimate.config["generation"]["max_new_tokens"]
    return Effort(
        reading=rows * shown * estimate.unpruned.prefill(shown),
        steps=min(LONGEST * estimate.answer, most) * -(-rows // estimate.side_by_side),
        read=rows * shown,
        written=rows * min(estimate.answer, most),
    )


def learning(estimate: Estimate) -> Effort:
    """Backward is as much again for the states, and once more for weights that are trained themselves; a block that
    is checkpointed is computed twice, as is the head where a batch has more labels than one chunk. Held-out rows
    only go forward. What is read is for the teacher."""
    trainer, examples = estimate.config["trainer"], estimate.examples
    size, teacher = estimate.pruned, estimate.teacher
    row = min(estimate.rows.prompt + estimate.answer, estimate.config["max_length"])
    labels = min(estimate.answer, row)
    held_out = estimate.config["validation"] * estimate.validations
    again = trainer["batch_size"] * labels > trainer["head_chunk"]
    passes, checkpointed = 2 + estimate.is_full, bool(trainer.get("gradient_checkpointing"))
    bodies, heads = examples * (passes + checkpointed) + held_out, examples * (passes + again) + held_out
    adapter = 0 if estimate.is_full else 2 * estimate.trained * (examples * (3 + checkpointed) + held_out)
    learned = row * (bodies * size.body(row) + adapter) + heads * 2 * labels * size.head
    shown, judged = examples + held_out, examples * (1 + again) + held_out
    read = shown * row * teacher.body(row) + judged * 2 * labels * teacher.head
    return Effort(learning=learned, reading=read if estimate.needs_teacher else 0, trained=row * examples)


def evaluating(estimate: Estimate, size: Size, *, beside: bool) -> Effort:
    """All tasks; perplexity, which reads the held-out text once; and KL, for which the model and the unpruned one
    `beside` it both read it again. There the head is applied to every token."""
    evaluation, texts, whole = estimate.config["evaluation"], estimate.text, estimate.unpruned
    padded = texts.padded * ((1 + beside) * size.body(texts.padded) + beside * whole.body(texts.padded))
    heads = texts.mean * 2 * ((1 + beside) * size.head + beside * whole.head)
    read = texts.count * texts.mean * (1 + 2 * beside)
    asked = [evaluation[name] for name in ("tasks", "limit", "batch_size", "shots", "max_new_tokens")]
    asked.append((evaluation.get("data_dir"), evaluation.get("side")))
    return judging(size, *asked) + Effort(reading=texts.count * (padded + heads), read=read)


def judging(
    size: Size,
    tasks: Sequence[str],
    limit: int | Mapping[str, int] | None,
    batch: int,
    shots: int | Mapping[str, int] | None = None,
    longest: int | None = None,
    of: tuple[str | None, str | None] = (None, None),
) -> Effort:
    """Tasks by lm-eval, which computes the logits of every token where answers are compared, of the last one of a
    prompt where they are written. Tasks that are not known here count nothing. `of`: the folder of their
    rows, and the side of their items."""
    total = Effort()
    for task in tasks:
        if (items := items_of(task, of[0])) is not None:
            count, length = limited(limit, task, items.count, of[1]), request(task, shots)
            read, whole = count * items.passes * length, size.body(length) + 2 * size.head
            steps = min(LONGEST * items.written, longest or MOST_WRITTEN) * -(-count // batch)
            flops = read * (size.prefill(length) if items.written else whole)
            total += Effort(reading=flops, steps=steps, read=read, written=count * items.written)
    return total
