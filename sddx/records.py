"""The values that flow between rooms: artifacts, cuts, examples, model outputs, batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from annotated_types import Ge, Gt, Interval, Lt, MinLen

from sddx.errors import UserError

if TYPE_CHECKING:
    import torch

# What numbers settings can be, for the parameters that take them.
Count = Annotated[int, Ge(1), Lt(2**63)]
Natural = Annotated[int, Ge(0), Lt(2**63)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
Tasks = Annotated[Sequence[str], MinLen(1)]


class Amounts:
    """A dataclass of numbers of which two are added field by field."""

    def __add__(self, other: Self) -> Self:
        pairs: Any = zip(vars(self).values(), vars(other).values(), strict=True)
        return type(self)(*(mine + more for mine, more in pairs))


@dataclass(frozen=True)
class Artifact:
    """What one stage hands to the next: a finished, content-addressed folder (or file). `reading` is a digest of
    what else decides what is read there, and counts with the key: of a model, where its parts are found."""

    stage: str
    key: str
    path: Path
    reading: str = ""


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated: its name, its role (`reference`, `cut` or `student`; of merging `parent`, `mixed`
    or `merged`), and by name what it is made of beside the unpruned model."""

    name: str
    role: str
    inputs: Mapping[str, Artifact | None]


# Of the models that every run evaluates; a run without training has no student.
ROLES = {"unpruned": "reference", "pruned": "cut", "recovered": "student"}


GRANULARITIES = ("blocks", "attention", "feedforward", "sublayers")


@dataclass(frozen=True)
class Units:
    """What can be removed from a model of `total` blocks, in the order in which it runs: whole blocks, their
    attention branches, their feed-forward branches, or both kinds of branch (`sublayers`)."""

    granularity: str
    total: int

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            known = ", ".join(GRANULARITIES)
            raise UserError(f"pruning.units={self.granularity!r} is not known. Use one of {known}.")

    def __len__(self) -> int:
        return self.total * len(self._kinds)

    @property
    def _kinds(self) -> tuple[str, ...]:
        return ("attention", "feedforward") if self.granularity == "sublayers" else (self.granularity,)

    def unit(self, number: int) -> tuple[str, int]:
        """(`blocks`, `attention` or `feedforward`, the block's number) of the unit with this number."""
        block, kind = divmod(number, len(self._kinds))
        return self._kinds[kind], block

    @property
    def names(self) -> list[str]:
        """`block 3`, `attention 3`, .. of every unit."""
        pairs = [self.unit(number) for number in range(len(self))]
        return [f"{kind.removesuffix('s')} {block}" for kind, block in pairs]

    def cut(self, removed: Collection[int]) -> Cut:
        """The cut that removes the units with these numbers."""
        gone: dict[str, set[int]] = {"blocks": set(), "attention": set(), "feedforward": set()}
        for kind, block in map(self.unit, removed):
            gone[kind].add(block)
        whole = gone["blocks"] | (gone["attention"] & gone["feedforward"])
        kept = tuple(block for block in range(self.total) if block not in whole)
        halves = [tuple(sorted(gone[kind] - whole)) for kind in ("attention", "feedforward")]
        return Cut(kept, self.total, *halves)


ANSWERS_FILE = "answers.jsonl"  # what the unpruned model wrote
REWRITES_FILE = "rewrites.jsonl"  # the same beside references, with what was found wrong
MERGING, STUDENTS = "merging", "merging.students"  # choices that say what students become, and which these are
OWN_PROMPTS = "dataset"  # what the prompts of a run's own data set are called where drafts are tried
CUT_FILE = "cut.json"  # in which stages keep a cut
SHARES_FILE = "shares.json"  # how much of the second of two students each block of a merge takes
PROFILE_FILE = "profile.txt"  # of a training that was looked at


@dataclass(frozen=True)
class Cut:
    """Which parts of a model stay. Blocks are counted from 0; every list is ascending.

    `kept[j]` is the teacher block that student block `j` came from. Of the kept blocks, those in
    `no_attention` lost their attention branch and those in `no_feedforward` their feed-forward branch; a block
    that loses both is removed.
    """

    kept: tuple[int, ...]
    total: int
    no_attention: tuple[int, ...] = ()
    no_feedforward: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ascending = tuple(sorted(set(self.kept)))
        if ascending != self.kept or not set(self.kept) <= set(range(self.total)):
            raise ValueError(f"kept blocks must be ascending and within 0..{self.total - 1}, not {self.kept}")
        for halves in (self.no_attention, self.no_feedforward):
            if tuple(sorted(set(halves))) != halves or not set(halves) <= set(self.kept):
                raise ValueError(
                    f"blocks that lose a branch must be ascending and among the kept ones, not {halves}"
                )
        if both := set(self.no_attention) & set(self.no_feedforward):
            raise ValueError(f"blocks {sorted(both)} lose both branches: leave them out of kept")

    @classmethod
    def without(cls, removed: set[int] | range, total: int) -> Cut:
        """The cut that removes exactly these blocks."""
        return cls(tuple(block for block in range(total) if block not in removed), total)

    @property
    def removed(self) -> tuple[int, ...]:
        """The blocks that are gone as a whole."""
        return tuple(block for block in range(self.total) if block not in set(self.kept))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The runs of removed blocks, as (first, one past the last)."""
        edges = [-1, *self.kept, self.total]
        return [(below + 1, above) for below, above in pairwise(edges) if above - below > 1]

    @property
    def name(self) -> str:
        """The depth that is left, as the paper writes it: `26L`; `32L-6A4F` where 6 of the kept blocks lost
        their attention and 4 their feed-forward branch."""
        halves = [(self.no_attention, "A"), (self.no_feedforward, "F")]
        lost = "".join(f"{len(blocks)}{letter}" for blocks, letter in halves if blocks)
        return f"{len(self.kept)}L" + (f"-{lost}" if lost else "")

    def save(self, path: Path) -> None:
        """Write the cut as JSON."""
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Cut:
        """The cut that `save` wrote; what an older file does not name is nothing."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(fields.get(name, ())) for name in ("kept", "no_attention", "no_feedforward")}
        return cls(total=fields["total"], **lists)


@dataclass(frozen=True)
class Example:
    """One training example. `origin` is `reference` or `self`; `note` says why a rewrite was refused."""

    id: str
    prompt: str
    response: str
    origin: str = "reference"
    note: str = ""


@dataclass(frozen=True)
class Rewrite:
    """One example with the model's answer beside its reference; `reason` says why it was refused, or is
    empty."""

    id: str
    prompt: str
    reference: str
    answer: str
    reason: str = ""


@dataclass(frozen=True)
class Dataset:
    """Examples in their seeded order, with what is needed to distil and to evaluate them.

    `check(answer, reference) -> bool` compares final answers; `rewrite` names the rewriting template;
    `trains` names the evaluation tasks whose skill these examples train.
    """

    examples: list[Example]
    check: Callable[[str, str], bool]
    rewrite: str
    trains: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outputs:
    """What a model gives a loss: final hidden state [batch, time, width] after the norm, the head that
    turns it into logits, the output of every block (the last one after the norm) where asked for, and the trained
    weights that the head uses."""

    hidden: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]
    states: tuple[torch.Tensor, ...] = ()
    head_weights: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Coarse:
    """A model's distribution at each row, as far as its likeliest tokens tell: their `ids` [rows, k], and `logs`
    [rows, k + 1], the logarithms of their probabilities under the softmax at `temperature` over the whole
    vocabulary, and last of what all others have together ([rows, k] where there are no others)."""

    ids: torch.Tensor
    logs: torch.Tensor
    temperature: float


@dataclass(frozen=True)
class Batch:
    """Token ids, attention mask and labels, all [batch, time]. `labels[b, t]` is the token that position
    `t` must predict (already shifted), or -100 where nothing is trained."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: Any) -> Batch:
        """The same rows on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))

    @property
    def for_teacher(self) -> Batch:
        """What a teacher reads of these rows."""
        return self

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model reads of these rows, by name."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def rows(self) -> list[tuple[list[int], list[int]]]:
        """The tokens and the labels of each row, without padding."""
        lengths = self.attention_mask.sum(1).tolist()
        return [
            (ids[:length], labels[:length])
            for ids, labels, length in zip(self.input_ids.tolist(), self.labels.tolist(), lengths, strict=True)
        ]


@dataclass(frozen=True)
class Guided(Batch):
    """Rows to which a teacher reads other prompts: `shown` has the same labels, row by row, behind those."""

    shown: Batch

    def to(self, device: Any) -> Guided:
        """The same rows on another device."""
        return Guided(**vars(super().to(device)), shown=self.shown.to(device))

    @property
    def for_teacher(self) -> Batch:
        """What a teacher reads of these rows."""
        return self.shown


def flat_spans(position_ids: torch.Tensor) -> list[tuple[int, int]]:
    """Where each text of a flat row begins and ends, by positions [1, tokens] that begin at 0 with each of them."""
    begins = [*(position_ids[0] == 0).nonzero()[:, 0].tolist(), position_ids.shape[1]]
    return list(pairwise(begins))


@dataclass(frozen=True)
class Packed(Batch):
    """Rows one after the other in a flat one, [1, tokens], without padding: `position_ids` begin at 0 again with
    each of them."""

    position_ids: torch.Tensor

    def to(self, device: Any) -> Packed:
        """The same rows on another device."""
        return Packed(**vars(super().to(device)), position_ids=self.position_ids.to(device))

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model reads of these rows, by name."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids}

    @property
    def rows(self) -> list[tuple[list[int], list[int]]]:
        """The tokens and the labels of each row."""
        ids, labels = self.input_ids[0].tolist(), self.labels[0].tolist()
        return [(ids[begin:end], labels[begin:end]) for begin, end in flat_spans(self.position_ids)]
