"""Drafts of the kept runs by arm: `python docs/results/drafted.py NAME BASE`.

NAME is a folder of docs/results/data, BASE the arm that the others are held against, named as contrast.py names
them (sft:reference). A row a draft and lookahead: acceptance with its 95 % interval over seeds, the tokens that a
pass of the unpruned model brings, and the paired difference in acceptance to BASE, in points over the seeds that
both have. The untuned draft is one model, whichever run it was tried in.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from statistics import mean
from typing import Any

from tables import arm, runs

from sddx.records import OWN_PROMPTS
from sddx.report.curves import seed_of
from sddx.report.subjects import UNTUNED, having
from sddx.report.table import ABSENT, grid, within
from sddx.statistics.intervals import t_interval

Drafts = dict[tuple[str, str], dict[int, dict[str, Any]]]  # by arm and lookahead, by seed


def drafts(name: str) -> Drafts:
    """Raises SystemExit where two runs of one arm and seed say different things."""
    found: Drafts = defaultdict(dict)
    for run in runs(name):
        for who, model in ((UNTUNED, having(run, "cut")), (arm(run), having(run, "student"))):
            if model is None or model not in run["drafts"]:
                continue
            for ahead, record in run["drafts"][model][OWN_PROMPTS]["lookaheads"].items():
                known = found[who, ahead].setdefault(seed_of(run, model), record)
                if known["acceptance"] != record["acceptance"]:
                    sys.exit(f"{who} was drafted twice at one seed, {ahead} ahead, with other results")
    return found


def row(found: Drafts, who: str, ahead: str, base: str) -> list[str]:
    seeds, theirs = found[who, ahead], found[base, ahead]
    rates = {seed: 100 * each["acceptance"] for seed, each in seeds.items()}
    both = [rates[seed] - 100 * theirs[seed]["acceptance"] for seed in rates if seed in theirs]
    against = within(t_interval(both), "+.1f") if len(both) > 1 and who not in (UNTUNED, base) else ABSENT
    length = f"{mean(each['length'] for each in seeds.values()):.2f}"
    several = [*rates.values()]
    accepted = within(t_interval(several), ".1f") if len(several) > 1 else f"{several[0]:.1f}"
    return [who, ahead, str(len(seeds)), accepted, length, against]


def table(name: str, base: str) -> str:
    """Markdown."""
    found = drafts(name)
    if base not in (known := sorted({who for who, _ in found})):
        sys.exit(f"{base} is no arm of {name}; there are {', '.join(known)}")
    order = sorted(found, key=lambda key: (int(key[1]), key[0] != UNTUNED, key[0] != base, key[0]))
    rows = [row(found, who, ahead, base) for who, ahead in order]
    return grid(["draft", "ahead", "seeds", "accepted, %", "tokens a pass", f"minus {base}, points"], rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(table(*sys.argv[1:]))
