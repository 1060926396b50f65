"""Keep what the runs of a sweep found: `python docs/results/collect.py SWEEP_FOLDER docs/results/data/NAME`.

Writes `runs.jsonl`, one finished run a line (its summary without paths), and in `items/` what every item scored in
each evaluation, once for all runs that share it, under the key of its artifact. What is there already stays, so
that a grid may run in parts, on machines that come and go.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KEPT = ("scores", "bits_per_byte", "margin", "clusters", "hashes")
PLACES = {"model_path", "store", "peak_memory"}


def without_paths(value: Any) -> Any:
    """The same, but of a path the last part alone."""
    if isinstance(value, dict):
        return {name: without_paths(each) for name, each in value.items()}
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def items(samples: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """By task, what every item scored."""
    return {
        task: {name: [rounded(value) for value in record[name]] for name in KEPT if record.get(name)}
        for task, record in samples.items()
    }


def collect(sweep: Path, to: Path) -> int:
    """Keep the finished runs; the number of all that are kept there."""
    (to / "items").mkdir(parents=True, exist_ok=True)
    file = to / "runs.jsonl"
    known = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    runs = {json.dumps(run["artifacts"], sort_keys=True): run for run in known}
    for found in sorted(sweep.glob("**/summary.json")):
        summary = json.loads(found.read_text(encoding="utf-8"))
        samples = json.loads(found.with_name("samples.json").read_text(encoding="utf-8"))
        kept = {name: without_paths(value) for name, value in summary.items() if name not in PLACES}
        runs.setdefault(json.dumps(summary["artifacts"], sort_keys=True), kept)
        for model, judged in samples.items():
            path = to / "items" / f"{summary['artifacts'][f'evaluate_{model}'][:16]}.json"
            if not path.exists():
                path.write_text(json.dumps(items(judged)) + "\n", encoding="utf-8")
    (to / "runs.jsonl").write_text(
        "".join(json.dumps(run, sort_keys=True) + "\n" for run in runs.values()), encoding="utf-8"
    )
    return len(runs)


if __name__ == "__main__":
    print(f"{collect(Path(sys.argv[1]), Path(sys.argv[2]))} runs kept in {sys.argv[2]}")
