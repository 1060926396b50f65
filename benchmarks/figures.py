"""The curves of README and docs: `python benchmarks/figures.py SWEEP_FOLDER [...]` draws them into figures/.

One SVG for each axis that varies in the sweeps and each kind of skill, in ink on white, so that any page
can show it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sddx.report import figures, page
from sddx.report.curves import families

MEASURES = {"recovery_trained": "trained", "recovery_held_out": "held_out", "recovery": "recovery"}


def main() -> None:
    out = Path(__file__).parent / "figures"
    for family in families(page.of_folders(map(Path, sys.argv[1:]))):
        for measure, name in MEASURES.items():
            svg = figures.on_white(figures.curves(family, measure, name))
            (out / f"{family.axis}_{name}.svg").write_text(svg)


if __name__ == "__main__":
    main()
