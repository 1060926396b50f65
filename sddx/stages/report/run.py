"""report: what a run found, from everything that it built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sddx.records import Artifact
from sddx.report.summary import RunArtifacts, summarised, write
from sddx.runtime import Runtime


def report(
    out: Path,
    *,
    base: Artifact,
    pruned: Artifact,
    results: Sequence[Artifact],
    runtime: Runtime,
    choices: dict[str, Any],
    subjects: list[dict[str, str]],
    **further: Any,
) -> None:
    """Writes `summary.json` (the run's choices, recoveries with their intervals, scores, costs) and `samples.json`
    (every item's score and hash, for comparisons). `results` are those of the `subjects`, in their order, the one
    that all others are compared with first; what `further` there may be, `RunArtifacts` says."""
    artifacts = RunArtifacts(base, pruned, subjects, results, **further)
    summary, samples = summarised(artifacts)
    write(out / "summary.json", {"choices": choices, **summary})
    write(out / "samples.json", samples)
