"""report: what a run found, from everything that it built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sddx.records import Artifact
from sddx.report.summary import Found, summarised, write
from sddx.runtime import Runtime


def report(out: Path, *found: Artifact, runtime: Runtime, choices: dict[str, Any]) -> None:
    """Writes `summary.json` (the run's choices, recoveries with their intervals, scores, costs) and `samples.json`
    (every item's score and hash, for comparisons). `found` are all artifacts of a run, in the order of
    `Found.artifacts`."""
    summary, samples = summarised(Found.of(found))
    write(out / "summary.json", {"choices": choices, **summary})
    write(out / "samples.json", samples)
