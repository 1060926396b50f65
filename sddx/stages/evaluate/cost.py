"""What evaluating takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sddx.estimate import peaks
from sddx.estimate.costs import LEARNED, Estimate, Part
from sddx.estimate.efforts import Effort
from sddx.estimate.skeleton import Size
from sddx.models.load import DTYPES

SMALLER = "evaluation.batch_size"  # what to lower where its memory does not suffice


def parts(estimate: Estimate) -> Iterator[Part]:
    """Each model that is evaluated."""
    yield evaluated(estimate, "unpruned", estimate.unpruned, ())
    yield evaluated(estimate, "pruned", estimate.pruned, ("pruning", "calibration"))
    if estimate.trains:
        yield evaluated(estimate, "recovered", estimate.pruned, LEARNED)


def evaluated(estimate: Estimate, name: str, size: Size, settings: Sequence[str]) -> Part:
    """The evaluation of one model, which hangs on these settings beside those of the evaluation."""
    evaluation = estimate.config["evaluation"]
    about = [evaluation, estimate.config["text"], [estimate.config[each] for each in settings]]
    effort, asked = _effort(estimate, size, beside=name != "unpruned"), estimate.judging(evaluation)
    return estimate.part(f"evaluate {name}", about, size, effort, cached=asked.cached, rows=asked.batch_size)


def peak(estimate: Estimate) -> float | None:
    """The unpruned model's weights, in which the others are, and those of a model of its own weights beside it; a
    pass of lm-eval (not where vLLM evaluates), or one over held-out texts beside the other model's states."""
    batch, longest = estimate.text.side_by_side, estimate.text.longest
    states = batch * longest * estimate.shape.hidden_size * DTYPES[estimate.model["dtype"]].itemsize
    passing = states + peaks.passing(estimate, batch, longest)
    if not estimate.by_vllm:
        passing = max(passing, peaks.judging(estimate, estimate.judging(estimate.config["evaluation"])))
    return peaks.looked_at(estimate, estimate.own_weights) + passing


def _effort(estimate: Estimate, size: Size, *, beside: bool) -> Effort:
    """All tasks; and the held-out text, which the model and the unpruned one `beside` it read once, with
    the head on every token."""
    texts, whole = estimate.text, estimate.unpruned
    padded = texts.padded * (size.body(texts.padded) + beside * whole.body(texts.padded))
    heads = texts.mean * 2 * (size.head + beside * whole.head)
    read = texts.count * texts.mean * (1 + beside)
    of_text = Effort(reading=texts.count * (padded + heads), read=read)
    return estimate.judging(estimate.config["evaluation"]).effort(size) + of_text
