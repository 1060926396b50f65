"""The values that flow between rooms: artifacts, cuts, examples, model outputs, batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class UserError(Exception):
    """A mistake that the user can mend: what was wrong, what was given, what to do.

    Entry points print the message without a traceback and exit with status 2.
    """


@dataclass(frozen=True)
class Artifact:
    """What one stage hands to the next: a finished, content-addressed folder (or file)."""

    stage: str
    key: str
    path: Path


@dataclass(frozen=True)
class Cut:
    """Which blocks of a model stay. Blocks are counted from 0; `kept` is ascending.

    `kept[j]` is the teacher block that student block `j` came from.
    """

    kept: tuple[int, ...]
    total: int

    def __post_init__(self) -> None:
        ascending = tuple(sorted(set(self.kept)))
        if ascending != self.kept or not self.kept or self.kept[0] < 0 or self.kept[-1] >= self.total:
            raise ValueError(f"kept blocks must be ascending and within 0..{self.total - 1}, not {self.kept}")

    @classmethod
    def without(cls, removed: set[int] | range, total: int) -> Cut:
        """The cut that removes exactly these blocks."""
        return cls(tuple(block for block in range(total) if block not in removed), total)

    @property
    def removed(self) -> tuple[int, ...]:
        return tuple(block for block in range(self.total) if block not in set(self.kept))

    @property
    def name(self) -> str:
        """The depth that is left, as the paper writes it: `26L`."""
        return f"{len(self.kept)}L"

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> Cut:
        fields = json.loads(path.read_text())
        return cls(tuple(fields["kept"]), fields["total"])


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
    """Examples in their seeded order, with what is needed to distil and to judge them.

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
    turns it into logits, and the output of every block (the last one after the norm) where asked for."""

    hidden: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]
    states: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Token ids, attention mask and labels, all [batch, time]. `labels[b, t]` is the token that position
    `t` must predict (already shifted), or -100 where nothing is trained."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: Any) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))
