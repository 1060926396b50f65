"""How far a model moved from the unpruned one: divergences, surprise, representations and answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch

from sddx.data.selfdata import CUT_OFF, TOO_LONG, Answer, write_answers
from sddx.drift.passes import pass_at
from sddx.drift.reading import Reading, surprise
from sddx.drift.similarity import cka, concentration
from sddx.errors import UserError
from sddx.evaluation.text import Places, attended, divergences, labelled
from sddx.models.outputs import block_states, run
from sddx.records import Batch, Count, Example, Natural, NonNegative, Rewrite, Seed
from sddx.statistics.answers import mean_length, repetition
from sddx.students.teacher import SeparateTeacher

_log = logging.getLogger(__name__)
# Tokens a channel: fewer do not tell how alike blocks are, and no more are read.
FEWEST, MOST = 4, 8
PASSES = (1, 4, 16)  # k of pass@k


@dataclass(frozen=True)
class Material:
    """What a drift is measured on: held-out rows with their references, the same rows as the student would learn
    them, what the unpruned model wrote for them if it wrote, and held-out texts. `check(answer, reference)` is True
    of a right answer; None where nobody asks."""

    rows: Sequence[Example]
    learned: Sequence[Example]
    rewrites: Sequence[Rewrite]
    texts: Sequence[str]
    check: Callable[[str, str], Any] | None = None

    def first(self, size: int) -> Material:
        """The same of the first rows alone."""
        ids = {row.id for row in self.rows[:size]}
        learned = [row for row in self.learned if row.id in ids]
        rewrites = [each for each in self.rewrites if each.id in ids]
        return replace(self, rows=self.rows[:size], learned=learned, rewrites=rewrites)

    @property
    def answers(self) -> dict[str, list[Example]]:
        """Answers by kind: references, those that are learned, and where the unpruned model wrote, the ones of its
        own that were accepted, with the references that these replace."""
        accepted = [each for each in self.rewrites if not each.reason]
        own = [Example(each.id, each.prompt, each.answer, "self") for each in accepted]
        replaced = [Example(each.id, each.prompt, each.reference) for each in accepted]
        of_own = {"self": own, "replaced": replaced} if accepted else {}
        return {"reference": [*self.rows], "learned": [*self.learned], **of_own}

    @property
    def apart(self) -> dict[str, str]:
        """By kind of answers the first one that has the same: references, where it is these that are learned."""
        answers = self.answers
        return {kind: next(one for one in answers if answers[one] == answers[kind]) for kind in answers}


@dataclass(frozen=True)
class Drift:
    """The group `drift`: over how many held-out rows it is measured (`size`), and how the model's own samples are
    written: greedily at a `temperature` of 0, else drawn by `seed`. `samples` more are drawn of each model to each
    prompt for pass@k. Raises UserError where these would all be the same."""

    size: Count
    max_new_tokens: Count
    batch_size: Count
    temperature: NonNegative
    seed: Seed
    samples: Natural = 0

    def __post_init__(self) -> None:
        if self.samples == 1:
            raise UserError(
                "drift.samples=1: pass@1 takes two answers to a prompt, and pass@k 2k. Use 2 or more, or 0."
            )
        if self.samples and not self.temperature:
            raise UserError(
                f"drift.samples={self.samples} answers to a prompt are drawn, and at drift.temperature=0 all are "
                "the same. Use drift.temperature=1."
            )

    def steps(self, material: Material) -> int:
        """What there is to do, as answers that are written and rows that are read: by `_divergences` prompts,
        references, answers and texts, by `surprise` each kind of answers once a model, by `similarity` the texts
        again, or some of them."""
        asked = material.first(self.size)
        answers = asked.answers
        judged = sum(len(answers[kind]) for kind in {*asked.apart.values()})
        return len(asked.rows) * (4 + 2 * self.samples) + 2 * judged + 2 * len(asked.texts)

    def __call__(
        self,
        unpruned: Any,
        model: Any,
        kept: Sequence[int],
        material: Material,
        reading: Reading,
    ) -> dict[str, Any]:
        """How far `model`, whose blocks are the `kept` ones of the `unpruned` one, moved from it.

        Under `kl` stands KL(unpruned || model), by where it was taken (`_divergences`); under `surprise`, of both
        models, what `surprise` finds of each kind of answers (`Material.answers`); under `similarity` the CKA of
        each kept block with itself in the unpruned model (`similarity`); under `answers` length, repetition and
        share cut off of what the model wrote for the rows' prompts; where `samples` are drawn, under `passes` the
        pass@k of both models over them, for each k of PASSES of which there are twice as many. Raises UserError
        where no text holds a token.
        """
        asked = material.first(self.size)
        written = self._written(model, asked.rows, reading, self.seed)
        models = {"unpruned": unpruned, "model": model}
        drawn = {name: self._passes(each, asked, reading) for name, each in models.items() if self.samples}
        return {
            "rows": len(asked.rows),
            "kl": _divergences(unpruned, model, asked, written, reading),
            "surprise": {name: _surprises(each, asked, reading) for name, each in models.items()},
            "similarity": similarity(unpruned, model, kept, reading.texts(material.texts)),
            "answers": _looked_at(asked.rows, written),
            **({"passes": drawn} if drawn else {}),
        }

    def _passes(self, model: Any, material: Material, reading: Reading) -> dict[str, float]:
        """pass@k by k, the mean over rows whose prompt leaves room for an answer: right is a whole answer that the
        check finds right."""
        assert material.check is not None
        right: dict[str, int] = {}
        for number in range(self.samples):
            # No answer of one seed is one of another's.
            seed = self.seed * self.samples + number
            written = self._written(model, material.rows, reading, seed)
            for row, answer in zip(material.rows, written, strict=True):
                if answer.fault != TOO_LONG:
                    good = not answer.fault and material.check(answer.text, row.response) is True
                    right[row.id] = right.get(row.id, 0) + good
        tries = [k for k in PASSES if right and 2 * k <= self.samples]
        return {str(k): mean(pass_at(k, each, self.samples) for each in right.values()) for k in tries}

    def _written(self, model: Any, rows: Sequence[Example], reading: Reading, seed: int) -> list[Answer]:
        """The model's own answers."""
        return write_answers(
            model,
            reading.tokenizer,
            [row.prompt for row in rows],
            reading.progress,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            temperature=self.temperature,
            top_p=1.0,
            top_k=0,
            seed=seed,
        )


def _divergences(
    unpruned: Any, model: Any, material: Material, written: Sequence[Answer], reading: Reading
) -> dict[str, dict[str, Any]]:
    """KL(unpruned || model) in nats a token, by where it was taken: at every token of the rows' prompts, which end
    where answers begin; at the tokens of their references and of the model's own answers, the end token among them;
    at every token of held-out texts. With the part of the sum that the top 20 % of the tokens have."""
    pairs = zip(material.rows, written, strict=True)
    own = [Example(row.id, row.prompt, each.text) for row, each in pairs if each.fault != TOO_LONG]
    taken: dict[str, tuple[Iterable[Batch], Places]] = {
        "prompts": (reading.prompts(material.rows), attended),
        "references": (reading.answered(material.rows), labelled),
        "samples": (reading.answered(own, uncut=True), labelled),
        "text": (reading.by_length(material.texts), attended),
    }
    teacher = SeparateTeacher(unpruned)
    return {name: _spread(divergences(teacher, model, *where)) for name, where in taken.items()}


def _spread(nats: torch.Tensor) -> dict[str, Any]:
    average = float(nats.mean()) if len(nats) else None
    return {"nats": average, "top": concentration(nats), "tokens": len(nats)}


def _surprises(model: Any, material: Material, reading: Reading) -> dict[str, dict[str, float | None]]:
    """By kind of answers, those that are the same read once."""
    answers, apart = material.answers, material.apart
    found = {kind: surprise(model, answers[kind], reading) for kind in dict.fromkeys(apart.values())}
    return {kind: found[same] for kind, same in apart.items()}


def _looked_at(rows: Sequence[Example], written: Sequence[Answer]) -> dict[str, Any]:
    """What the model wrote, looked at; words of the references beside it."""
    whole = [answer for answer in written if answer.fault != TOO_LONG]
    texts = [answer.text for answer in whole]
    return {
        "answers": len(whole),
        "mean_length": mean_length(texts),
        "reference_length": mean_length([row.response for row in rows]),
        "repetition": repetition(texts),
        "cut_off": sum(answer.fault == CUT_OFF for answer in whole) / len(whole) if whole else None,
    }


def similarity(unpruned: Any, model: Any, kept: Sequence[int], batches: Iterable[Batch]) -> dict[str, Any]:
    """Under `blocks`, by the number in the unpruned model, the debiased linear CKA (`cka`) of what block `kept[j]`
    gives there with what block j gives in `model`, before the final norm, over the attended tokens of the texts
    but their first, whose state is the same whatever the text, and large. Up to MOST tokens a channel are read;
    where there are fewer than FEWEST, none is told, with a warning."""
    pairs: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in kept]
    tokens, channels = 0, 0
    for batch in batches:
        theirs, mine = _states(unpruned, batch), _states(model, batch)
        for block, states in enumerate(pairs):
            states.append((theirs[kept[block]], mine[block]))
        tokens, channels = tokens + len(mine[0]), mine[0].shape[1]
        if tokens >= MOST * channels:
            break
    if tokens < FEWEST * channels:
        _log.warning("%d tokens do not tell how alike blocks of %d channels are: CKA is left out", tokens, channels)
        pairs = []
    alike = [cka(*(torch.cat(side) for side in zip(*states, strict=True))) for states in pairs]
    return {"blocks": dict(zip(map(str, kept), alike, strict=False)), "tokens": tokens, "channels": channels}


@torch.no_grad()
def _states(model: Any, batch: Batch) -> list[torch.Tensor]:
    """What every block gives at the attended tokens but the first, [tokens, width] each, in main memory."""
    places = attended(batch)
    places[:, 0] = False
    with block_states(model) as states:
        run(model, batch.input_ids, batch.attention_mask)
    return [state[places].cpu() for state in states[1:]]
