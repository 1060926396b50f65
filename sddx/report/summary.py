"""What a run found: `summary.json`, `samples.json` and `table.md` in the run folder, from its artifacts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sddx.data.shards import read_rows
from sddx.evaluation.harness import compact
from sddx.evaluation.recovery import summarise
from sddx.records import Artifact, Cut, Rewrite
from sddx.report import table
from sddx.store import Store


@dataclass(frozen=True)
class Found:
    """What a run built, or found in the store. `rows` are the held-out shard and the training shards;
    `results` the evaluations of the unpruned, the pruned and the recovered model."""

    model: Artifact
    scores: list[Artifact]
    cut: Artifact
    data: Artifact
    rows: list[Artifact]
    student: Artifact
    results: dict[str, Artifact]

    def built(self) -> dict[str, list[Artifact]]:
        """The artifacts that stages made, by stage; evaluations by what they judged."""
        distilled = [shard for shard in self.rows if shard.stage == "distill"]
        stages = {"prepare": [self.data], "score": self.scores, "prune": [self.cut], "distill": distilled}
        stages |= {"train": [self.student]}
        stages |= {f"evaluate_{name}": [result] for name, result in self.results.items()}
        return {stage: artifacts for stage, artifacts in stages.items() if artifacts}


def conclude(found: Found, store: Store, folder: Path, name: str, choices: dict[str, Any]) -> dict[str, Any]:
    """Write the run's results, print them, and return the summary. The last line printed names the file."""
    results = {model: _read(result, "results.json") for model, result in found.results.items()}
    summary = {"name": name, "choices": choices, **_quality(found, results), **_cost(found, store)}
    summary["store"] = str(store.root)
    summary["accepted_sources"] = store.accepted
    _write(folder / "samples.json", {model: compact(result) for model, result in results.items()})
    _write(folder / "table.md", table.markdown(summary))
    _write(folder / "summary.json", summary)
    console = Console(width=max(100, Console().width))  # narrower, numbers are cut off
    if rewrites := _rewrites(found):
        table.acceptance(rewrites, console)
    table.show(summary, console)
    return summary


def _quality(found: Found, results: dict[str, Any]) -> dict[str, Any]:
    """Scores, recoveries, and what scores do not show."""
    trained = _read(found.data, "dataset.json")["trains"]
    records = results["unpruned"]["tasks"]
    scores = {
        model: {task: [sample["score"] for sample in record["samples"]] for task, record in result["tasks"].items()}
        for model, result in results.items()
    }
    return {
        **summarise(
            scores,
            chance={task: record["chance"] for task, record in records.items()},
            trained=trained,
            part_of={task: record["part_of"] for task, record in records.items()},
        ),
        "chance": {task: record["chance"] for task, record in records.items()},
        "text": {model: result["text"] for model, result in results.items()},
        "metrics": {
            model: {task: record["metrics"] for task, record in result["tasks"].items()}
            for model, result in results.items()
        },
        "unparsed": {
            model: {task: record["unparsed"] for task, record in result["tasks"].items() if record["unparsed"]}
            for model, result in results.items()
        },
    }


def _cost(found: Found, store: Store) -> dict[str, Any]:
    """What was cut, what was trained on, and what each stage took when it was built."""
    cut = Cut.load(found.cut.path / "cut.json")
    training = _read(found.student, "training.json")
    rewrites = _rewrites(found)
    manifests = {
        stage: [store.manifest(artifact) for artifact in artifacts] for stage, artifacts in found.built().items()
    }
    student = manifests["train"][0]
    return {
        "cut": list(cut.kept),
        "depth": cut.name,
        "parameters": _read(found.cut, "parameters.json"),
        "examples": training["examples"],
        "supervised_tokens": training["supervised_tokens"],
        "steps": training["steps"],
        "tokens_per_second": training["tokens_per_second"],
        "dropped_rows": training["dropped_rows"],
        "fallback_share": sum(bool(rewrite.reason) for rewrite in rewrites) / len(rewrites) if rewrites else None,
        "seconds": {stage: sum(m["seconds"] for m in made) for stage, made in manifests.items()},
        "peak_memory": {stage: max(m["peak_memory"] for m in made) for stage, made in manifests.items()},
        "artifacts": {
            "model": found.model.key,
            **{
                stage: [a.key for a in made] if len(made) > 1 else made[0].key
                for stage, made in found.built().items()
            },
        },
        "model_path": str(found.model.path),
        "dtype": student["spec"]["dtype"],
        "attention": student["spec"]["attention"],
        "versions": student["versions"],
        "device": student["device"],
        "threads": student["threads"],
    }


def _rewrites(found: Found) -> list[Rewrite]:
    """The judged answers that training drew on (without the held-out shard); empty for reference data."""
    shards = [shard for shard in found.rows[1:] if shard.stage == "distill"]
    return read_rows(Rewrite, *(shard.path / "rewrites.jsonl" for shard in shards))


def _read(artifact: Artifact, name: str) -> Any:
    return json.loads((artifact.path / name).read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    """The file appears complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
