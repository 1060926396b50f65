"""What the unpruned model wrote, by how it was asked: `python docs/results/written.py NAME` prints the table of
docs/results/real-model.md, from the runs that are kept in docs/results/data/NAME.

Copied, cut off and refused are shares of all answers, words are means. Surprise is the mean cross-entropy in nats
a token under the unpruned model, of references and of its own answers, over some of the rows whose answer was
accepted: other rows where another check accepted them.
"""

from __future__ import annotations

import sys
from typing import Any

from tables import runs

from sddx.report.table import grid, percent

SHOWN = {"right": "its own", "wrong": "another row's"}
HEAD = ["data set", "reference shown", "rows", "copied", "cut off", "refused by", "refused", "ROUGE-L"]


def row(run: dict[str, Any]) -> list[str]:
    """One run's cells."""
    choices, written = run["choices"], run["written"]
    reference = "none" if choices["loss"] == "sdd_plain" else SHOWN[choices.get("selfdata.reference", "right")]
    shares = [percent(written[name]) for name in ("copied", "cut_off")]
    check = choices.get("selfdata.check", "open")
    words, surprise = written["words"], written["surprise"]["unpruned"]
    return [
        choices["dataset"], reference, f"{written['rows']:,}", *shares, check, percent(1 - written["accepted"]),
        f"{written['rouge_l']:.2f}", *(f"{words[kind]:.0f}" for kind in ("reference", "self")),
        *(f"{surprise[kind]:.2f}" for kind in ("reference", "self")),
    ]  # fmt: skip


if __name__ == "__main__":
    sides = [f"{what}, {kind}" for what in ("words", "surprise") for kind in ("reference", "self")]
    print(grid([*HEAD, *sides], sorted(row(run) for run in runs(sys.argv[1]) if run["written"])))
