"""Write the items of the eight evaluation tasks: `python -m sddx.tiny.write_tasks`.

The files ship with the package; a test holds them to what this writes.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from sddx.tiny.dice import Dice
from sddx.tiny.skills import SKILLS, Item, items

FOLDER = Path(__file__).parent / "tasks"
COUNTS = {"report": 300, "selection": 150}


def line(item: Item, dice: Dice) -> str:
    """One item as a JSON line; choices stand in random order."""
    if not item.choices:
        return json.dumps({"question": item.prompt, "answer": item.final})
    choices = dice.shuffled(item.choices)
    return json.dumps({"question": item.prompt, "choices": choices, "answer": choices.index(item.answer)})


def lines(skill: str, split: str) -> list[str]:
    """The items of one task and split, selection or report."""
    dice = Dice(f"choices/{skill}/{split}")
    # Facts are shared between the splits, so selection goes on in the stream where report ends. No item is in both,
    # but for many the wrong choices alone differ: 93 of 150 of facts and 124 of myths ask what report asks.
    start = COUNTS["report"] if split == "selection" and skill in ("facts", "myths") else 0
    stream = items(skill, "report" if start else split)
    return [line(item, dice) for item in islice(stream, start, start + COUNTS[split])]


def main() -> None:
    """Write the items of every skill and split into the package."""
    for skill in SKILLS:
        for split in COUNTS:
            (FOLDER / f"{skill}.{split}.jsonl").write_text("\n".join(lines(skill, split)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
