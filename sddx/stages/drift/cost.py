"""What measuring drift takes."""

from __future__ import annotations

from collections.abc import Iterator

from sddx.estimate import peaks
from sddx.estimate.costs import WRITTEN, Estimate, Part
from sddx.estimate.efforts import Effort
from sddx.estimate.skeleton import Size
from sddx.estimate.texts import LONGEST

SMALLER = "drift.batch_size"  # what to lower where its memory does not suffice


def parts(estimate: Estimate) -> Iterator[Part]:
    """Of each model, what it reads and writes, and what the unpruned one reads for it."""
    if not (asked := estimate.config.get("drift")):
        return
    own = ("generation", "selfdata") if estimate.rewrites else ()
    for name, hangs_on in estimate.compared:
        about = [asked, [estimate.config[each] for each in ("dataset", "text", "max_length", *own)], hangs_on]
        drawn = asked.get("samples", 0)
        rows = asked["batch_size"]
        step = {"rows": rows, "cached": rows * (estimate.rows.prompt + _longest(estimate) / 2)}
        effort = _read(estimate, estimate.unpruned) + _written(estimate, estimate.unpruned) * drawn
        yield estimate.part(f"drift {name}", about, estimate.unpruned, effort, **step)
        effort = _read(estimate, estimate.pruned) + _written(estimate, estimate.pruned) * (1 + drawn)
        yield estimate.part(f"drift {name}", [about, "model"], estimate.pruned, effort, **step)


def peak(estimate: Estimate) -> float | None:
    """Weights, and those of a model of its own weights beside them; a pass over the longest held-out texts with the
    outputs of all blocks."""
    if not estimate.config.get("drift"):
        return None
    passing = peaks.passing(estimate, estimate.text.side_by_side, estimate.text.longest, states=True)
    return peaks.looked_at(estimate, estimate.own_weights) + passing


def _longest(estimate: Estimate) -> float:
    """Tokens of the longest answer of a batch, for which the others wait."""
    return min(LONGEST * estimate.answer, estimate.config["drift"]["max_new_tokens"])


def _read(estimate: Estimate, size: Size) -> Effort:
    """Held-out texts, twice, since blocks are compared apart from what they lead to; and the rows: their prompts,
    their references for divergence and for surprise, the model's own answers, and where the unpruned model wrote
    those that are learned, its own and the references that these replace. The head is applied to every token."""
    rows, texts, asked = estimate.rows, estimate.text, estimate.config["drift"]
    answered = rows.prompt + WRITTEN * rows.answer
    tokens = asked["size"] * (rows.prompt + (3 + 3 * estimate.rewrites) * answered)
    reading = 2 * texts.count * texts.padded * (size.body(texts.padded) + 2 * size.head)
    reading += tokens * (size.body(answered) + 2 * size.head)
    return Effort(reading=reading, read=2 * texts.count * texts.mean + tokens)


def _written(estimate: Estimate, size: Size) -> Effort:
    """A model's own answers: a step of every batch for each token of its longest, and the prompts read."""
    asked, shown = estimate.config["drift"], estimate.rows.prompt
    steps = _longest(estimate) * -(-asked["size"] // asked["batch_size"])
    read, written = asked["size"] * shown, asked["size"] * _longest(estimate)
    return Effort(reading=read * size.prefill(shown), steps=steps, read=read, written=written)
