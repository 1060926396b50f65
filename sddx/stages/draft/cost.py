"""What trying drafts takes."""

from __future__ import annotations

from collections.abc import Iterator

from sddx.estimate import peaks
from sddx.estimate.costs import Estimate, Part
from sddx.estimate.efforts import Effort
from sddx.estimate.texts import LONGEST

ACCEPTED = 0.7  # of drafted tokens; ours
SMALLER = "speculation.batch_size"  # what to lower where its memory does not suffice


def parts(estimate: Estimate) -> Iterator[Part]:
    """Of each draft, the steps of the target, each over all tokens that were drafted for it, and those of its own:
    to write alone, and at every lookahead."""
    if not (asked := estimate.config.get("speculation")):
        return
    passes = {ahead: _written(estimate) / _length(ahead) for ahead in asked["lookaheads"]}
    steps = _written(estimate) + sum(passes.values())
    drafted = sum(ahead * count for ahead, count in passes.items())
    for name, hangs_on in estimate.compared:
        about = [asked, estimate.config["dataset"], hangs_on]
        rows = asked["batch_size"]
        cached = rows * (estimate.rows.prompt + _written(estimate) / 2)
        step = {"cached": cached, "rows": rows * (1 + drafted / steps)}
        yield estimate.part(f"draft {name}", about, estimate.unpruned, _effort(estimate, steps), **step)
        effort, step = _effort(estimate, _written(estimate) + drafted), {"cached": cached, "rows": rows}
        yield estimate.part(f"draft {name}", [about, "draft"], estimate.pruned, effort, **step)


def peak(estimate: Estimate) -> float | None:
    """Weights, in which the draft is unless its own are trained, both memories when all answers are as long as
    allowed, and a pass over prompts twice as long as the mean."""
    if not (asked := estimate.config.get("speculation")):
        return None
    batch, prompt = asked["batch_size"], int(2 * estimate.rows.prompt) or 1
    columns = prompt + asked["max_new_tokens"] + max(asked["lookaheads"]) + 1
    memories = batch * columns * (estimate.unpruned.cache_bytes + estimate.pruned.cache_bytes)
    logits = 2 * batch * (max(asked["lookaheads"]) + 1) * estimate.shape.vocab_size * 4
    passing = peaks.passing(estimate, batch, prompt)
    return peaks.looked_at(estimate, estimate.own_weights) + memories + logits + passing


def _written(estimate: Estimate) -> float:
    """Tokens of the longest text of a batch, for which the others wait."""
    return min(LONGEST * estimate.answer, estimate.config["speculation"]["max_new_tokens"])


def _length(ahead: int) -> float:
    """Tokens that a pass brings at this lookahead."""
    return (1 - ACCEPTED ** (ahead + 1)) / (1 - ACCEPTED)


def _effort(estimate: Estimate, steps: float) -> Effort:
    """So many steps of every batch, and its prompts read once for each time that it is written."""
    asked = estimate.config["speculation"]
    sets, shown = 1 + len(asked["datasets"]), estimate.rows.prompt
    read = sets * asked["size"] * shown * (1 + len(asked["lookaheads"]))
    return Effort(
        reading=read * estimate.unpruned.prefill(shown),
        steps=sets * steps * -(-asked["size"] // asked["batch_size"]),
        read=read,
        written=sets * asked["size"] * steps,
    )
