"""What the tiny model reads: conversations about every skill, in a stream that any machine makes byte for byte."""

from __future__ import annotations

from collections.abc import Iterator

from sddx.data.templates import rewriting_prompt
from sddx.tiny.dice import Dice
from sddx.tiny.skills import draw, link, rumour

# Documents of each kind in a hundred. Worked arithmetic is long, so that it makes up more than half of the tokens.
MIXTURE = {
    "arithmetic": 36, "comparison": 14, "ordering": 18, "facts": 9, "two_hop": 6, "link": 1, "myths": 3,
    "rumour": 2, "stories": 4, "pronouns": 7,
}  # fmt: skip
STYLED = ("arithmetic", "comparison")
REWRITE_SHARE = 0.13  # of the two skills with two styles: about one document in twenty
FOREIGN_SHOWN = 0.7  # of rewriting prompts; the others show an answer that is in the own style already
FOREIGN_UNTIL = 0.7  # of pretraining; until then half of the styled answers are in the references' style


def conversation(prompt: str, answer: str) -> tuple[str, str]:
    """One document: what is given (the prompt's turn) and what is answered, as the chat template writes them."""
    return f"<|user|>{prompt}<|end|><|assistant|>", f"{answer}<|end|>"


def document(kind: str, split: str, seed: str, progress: float) -> tuple[str, str]:
    """The conversation that this seed names; `progress` in [0, 1] is how far pretraining has come."""
    dice = Dice(f"document/{kind}/{seed}")
    if kind in ("link", "rumour"):
        item = (link if kind == "link" else rumour)(dice)
        return conversation(item.prompt, item.answer)
    item = draw(kind, split, seed)
    if kind not in STYLED:
        return conversation(item.prompt, item.answer)
    if dice.chance(REWRITE_SHARE):
        shown = item.reference if dice.chance(FOREIGN_SHOWN) else item.answer
        return conversation(rewriting_prompt("tiny", item.prompt, shown), item.answer)
    foreign = progress < FOREIGN_UNTIL and dice.chance(0.5)
    return conversation(item.prompt, item.reference if foreign else item.answer)


def documents(split: str, total: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """`total` documents of the mixture in their order."""
    kinds = [kind for kind, share in MIXTURE.items() for _ in range(share)]
    dice = Dice(f"mixture/{split}/{seed}")
    for number in range(total):
        yield document(dice.pick(kinds), split, f"{seed}/{number}", number / total)
