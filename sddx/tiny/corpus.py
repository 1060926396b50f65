"""What the tiny model reads: conversations about every skill, in a stream that any machine makes byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import count

from sddx.data.templates import rewriting_prompt
from sddx.tiny.dice import Dice
from sddx.tiny.skills import Item, draw, link, rumour

# Documents of each kind in a hundred. Worked arithmetic is long, so that it makes up more than half of the tokens.
MIXTURE = {
    "arithmetic": 36, "comparison": 14, "ordering": 18, "facts": 9, "two_hop": 6, "link": 1, "myths": 3,
    "rumour": 2, "stories": 4, "pronouns": 7,
}  # fmt: skip
STYLED = ("arithmetic", "comparison")
REWRITE_SHARE = 0.13  # of the two skills with two styles: about one document in twenty
FOREIGN_SHOWN = 0.7  # of rewriting prompts; the others show an answer that is in the own style already
PARTS = ("calibration", "text")  # of the split `calibration`: what scores blocks, and what evaluates models
SCORED = 256  # first documents of calibration, seed 0: they chose cuts before the split had parts, and stay
FOREIGN_UNTIL = 0.7  # of pretraining; until then half of the styled answers are in the references' style


def conversation(prompt: str, answer: str) -> tuple[str, str]:
    """One document: what is given (the prompt's turn) and what is answered, as the chat template writes them."""
    return f"<|user|>{prompt}<|end|><|assistant|>", f"{answer}<|end|>"


@lru_cache(maxsize=4096)
def item_of(kind: str, split: str, seed: str) -> Item:
    """What the document asks that this seed names."""
    if kind in ("link", "rumour"):
        return (link if kind == "link" else rumour)(Dice(f"document/{kind}/{seed}"))
    return draw(kind, "calibration" if split in PARTS else split, seed)


def document(kind: str, split: str, seed: str, progress: float) -> tuple[str, str]:
    """The conversation that this seed names; `progress` in [0, 1] is how far pretraining has come."""
    dice, item = Dice(f"document/{kind}/{seed}"), item_of(kind, split, seed)
    if kind not in STYLED:
        return conversation(item.prompt, item.answer)
    if dice.chance(REWRITE_SHARE):
        shown = item.reference if dice.chance(FOREIGN_SHOWN) else item.answer
        return conversation(rewriting_prompt("tiny", item.prompt, shown), item.answer)
    foreign = progress < FOREIGN_UNTIL and dice.chance(0.5)
    return conversation(item.prompt, item.reference if foreign else item.answer)


def documents(split: str, total: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """`total` documents of the mixture in their order. `split` is one of the skills' or `text`; what stands in
    `text` is never asked in `calibration`, whatever the sizes and seeds."""
    for number, (kind, name) in enumerate(drawn(split, total, seed)):
        yield document(kind, split, name, number / total)


def drawn(split: str, total: int, seed: int) -> Iterator[tuple[str, str]]:
    """Kind and seed of each of these documents: for a part of the held-out split the first seed that gives an item
    of the part."""
    for kind, name in _mixed(split, total, seed):
        if split not in PARTS:
            yield kind, name
            continue
        tries = (f"{name}/{attempt}" if attempt else name for attempt in count())
        yield kind, next(each for each in tries if part_of(kind, item_of(kind, split, each).form) == split)


def _mixed(split: str, total: int, seed: int) -> Iterator[tuple[str, str]]:
    kinds = [kind for kind, share in MIXTURE.items() for _ in range(share)]
    dice = Dice(f"mixture/{split}/{seed}")
    for number in range(total):
        yield dice.pick(kinds), f"{seed}/{number}"


def part_of(kind: str, form: str) -> str:
    """The one part of the held-out split in which a canonical form may stand: half of the forms each, but for those
    of the first calibration documents. Facts and rumours, shared by all splits, are parted too. (`two_hop` has six
    forms in this split, one of which is left for `text`.)"""
    half = hashlib.sha256(f"held out/{kind}/{form}".encode()).digest()[0] % 2
    return "text" if half and (kind, form) not in _scored() else "calibration"


@cache
def _scored() -> frozenset[tuple[str, str]]:
    names = _mixed("calibration", SCORED, 0)
    return frozenset((kind, item_of(kind, "calibration", name).form) for kind, name in names)
