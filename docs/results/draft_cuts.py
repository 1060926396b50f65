"""Which scores of blocks say which cut makes a good draft: `python docs/results/draft_cuts.py SCORES REMOVED CUTS`.

SCORES is the scores.json that `python -m sddx.train stages=[score]` writes, of the embedded model; REMOVED how many
blocks each of so many random CUTS takes out. Every untuned draft is held, in one pass, against what the unpruned
model wrote greedily to 64 held-out prompts. A row a metric: the rank correlation of the drafts' acceptance with
minus the sum of the removed blocks' scores, and the acceptance of the metric's own cut.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import sddx
from sddx.compression.remove import apply_cut
from sddx.data.encode import render, token_ids
from sddx.data.selfdata import end_ids
from sddx.data.split import hold_out
from sddx.models.anatomy import blocks, set_blocks
from sddx.models.decoding import greedy, write
from sddx.models.load import load_model, load_tokenizer
from sddx.records import Cut
from sddx.report.agreement import lowest, per_unit
from sddx.report.table import grid
from sddx.speculation.measure import hits
from sddx.speculation.rules import Counts, forced
from sddx.statistics.intervals import rank_correlation
from sddx.tiny import data

CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"
HELD_OUT, BATCH, WRITTEN, AHEAD = 64, 8, 128, 4


class Trial:
    """The embedded model, prompts, and what it writes to them."""

    def __init__(self) -> None:
        self.model, tokenizer = load_model(CHECKPOINT), load_tokenizer(CHECKPOINT)
        made = data.dataset(
            skill="arithmetic", shift=1.0, size=2 * HELD_OUT, seed=0, check=None, rewrite="tiny", trains=[]
        )
        rows, _ = hold_out(made.examples, HELD_OUT)
        self.prompts = token_ids(tokenizer, [render(tokenizer, row.prompt) for row in rows])
        how: dict[str, Any] = {
            "max_new_tokens": WRITTEN,
            "batch_size": BATCH,
            "ends": end_ids(self.model, tokenizer),
        }
        self.texts = write(self.model, self.prompts, greedy, **how)

    def acceptance(self, removed: list[int]) -> float:
        """Of drafted tokens that were tested, the share that stays, without these blocks."""
        whole = apply_cut(self.model, Cut.without(set(removed), len(blocks(self.model))))
        agreeing = hits(self.model, self.prompts, self.texts, BATCH)
        set_blocks(self.model, whole)
        return sum((forced(row, AHEAD) for row in agreeing), Counts()).rates["acceptance"] or 0.0


def main(scores: str, removed: str, cuts: str) -> None:
    """Print the table."""
    trial, found = Trial(), json.loads(Path(scores).read_text(encoding="utf-8"))
    count, draw = len(blocks(trial.model)), random.Random(0)
    drawn = {tuple(sorted(draw.sample(range(count), int(removed)))) for _ in range(int(cuts))}
    accepted = {cut: trial.acceptance(list(cut)) for cut in sorted(drawn)}
    rows = []
    for metric, scored in found.items():
        values = per_unit(scored["mean"])
        told = rank_correlation([-sum(values[unit] for unit in cut) for cut in accepted], list(accepted.values()))
        own = lowest(scored, int(removed))
        interval = f"{told.estimate:.2f} ({told.low:.2f} to {told.high:.2f})"
        rows.append([metric, interval, " ".join(map(str, own)), f"{100 * trial.acceptance(own):.1f} %"])
    rows.sort(key=lambda row: -float(row[1].split()[0]))
    print(grid(["metric", f"rank correlation over {len(accepted)} cuts", "its own cut", "accepted"], rows))
    ordered = sorted(accepted.values())
    print(
        f"\nRandom cuts: {' / '.join(f'{100 * ordered[int(q * (len(ordered) - 1))]:.1f}' for q in (0, 0.5, 1))} %"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
