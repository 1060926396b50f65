"""What a run found, from its artifacts: the record of them, the summary, and the files in the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from sddx.data.shards import read_rows
from sddx.evaluation.harness import clusters_of, compact
from sddx.evaluation.recovery import likelihoods, reported_chance, summarise
from sddx.models.packaged import origin
from sddx.records import Artifact, Cut, Rewrite
from sddx.report import table
from sddx.shapes import FORMAT
from sddx.store import manifest


@dataclass(frozen=True)
class Taught:
    """What training went through, if there was any: the prepared data set, its held-out shard and its training
    shards (as they are, or rewritten), the student, and what was `written` where the rows are self-data."""

    data: list[Artifact] = field(default_factory=list)
    rows: list[Artifact] = field(default_factory=list)
    student: list[Artifact] = field(default_factory=list)
    written: list[Artifact] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """What a run built, or found in the store. `results` are the evaluations of the unpruned, the pruned and the
    recovered model (without training, of the first two); `overlap` what the training rows share with them."""

    model: Artifact
    scores: list[Artifact]
    cut: Artifact
    patches: list[Artifact]
    taught: Taught
    results: dict[str, Artifact]
    overlap: list[Artifact]

    def artifacts(self) -> list[Artifact]:
        """All of them in one row, from which `of` makes the record again."""
        taught = [*self.taught.data, *self.taught.rows, *self.taught.student, *self.taught.written]
        first = [self.model, *self.scores, self.cut, *self.patches]
        return [*first, *taught, *self.results.values(), *self.overlap]

    @classmethod
    def of(cls, artifacts: Sequence[Artifact]) -> Found:
        by_stage: dict[str, list[Artifact]] = {}
        for artifact in artifacts:
            by_stage.setdefault(artifact.stage, []).append(artifact)

        def some(*stages: str) -> list[Artifact]:
            return next((by_stage[stage] for stage in stages if stage in by_stage), [])

        taught = Taught(some("prepare"), some("distill", "rows"), some("train"), some("written"))
        results = dict(zip(table.MODELS, by_stage["evaluate"], strict=False))  # recovered: where there is one
        (model,), (cut,) = by_stage["model"], by_stage["prune"]
        return cls(model, some("score"), cut, some("patch"), taught, results, some("overlap"))

    def built(self) -> dict[str, list[Artifact]]:
        """The artifacts that stages made, by stage; evaluations by what they judged."""
        distilled = [shard for shard in self.taught.rows if shard.stage == "distill"]
        stages = {"prepare": self.taught.data, "score": self.scores, "prune": [self.cut], "patch": self.patches}
        stages |= {"distill": distilled, "train": self.taught.student, "written": self.taught.written}
        stages |= {f"evaluate_{name}": [result] for name, result in self.results.items()}
        stages |= {"overlap": self.overlap}
        return {stage: artifacts for stage, artifacts in stages.items() if artifacts}

    def rewrites(self) -> list[Rewrite]:
        """The judged answers that training drew on (without the held-out shard); empty for reference data."""
        shards = [shard for shard in self.taught.rows[1:] if shard.stage == "distill"]
        return read_rows(Rewrite, *(shard.path / "rewrites.jsonl" for shard in shards))


def conclude(found: Found, report: Artifact, folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Write the run's results into its folder, print them, and return the summary: `about` the run (its name,
    its store) and what its report says. The last line printed names the file."""
    summary = {"format": FORMAT, **about, **_read(report, "summary.json")}
    write(folder / "samples.json", (report.path / "samples.json").read_text(encoding="utf-8"))
    write(folder / "table.md", table.markdown(summary))
    write(folder / "summary.json", summary)
    console = Console(width=max(100, Console().width))  # narrower, numbers are cut off
    if rewrites := found.rewrites():
        table.acceptance(rewrites, console)
    table.show(summary, console)
    return summary


def summarised(found: Found) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the run's artifacts say: the summary, and by model what comparisons need of every item."""
    results = {model: _read(result, "results.json") for model, result in found.results.items()}
    return {**_quality(found, results), **_cost(found)}, {model: compact(r) for model, r in results.items()}


def _quality(found: Found, results: dict[str, Any]) -> dict[str, Any]:
    """Scores, recoveries, and what scores do not show."""
    trained = [task for data in found.taught.data for task in _read(data, "dataset.json")["trains"]]
    records = results["unpruned"]["tasks"]
    chance = {task: record["chance"] for task, record in records.items()}
    part_of = {task: record["part_of"] for task, record in records.items()}
    apart = {part_of[task] for task, record in records.items() if record["apart"]}
    clusters = {task: clusters_of(record["samples"]) for task, record in records.items()}
    scores = {
        model: {task: [sample["score"] for sample in record["samples"]] for task, record in result["tasks"].items()}
        for model, result in results.items()
    }
    return {
        **summarise(scores, chance=chance, trained=trained, part_of=part_of, apart=apart, clusters=clusters),
        "likelihoods": {model: likelihoods(r["tasks"], part_of, apart) for model, r in results.items()},
        "part_of": part_of,
        "chance": reported_chance(chance, part_of),
        "overlap": next((_read(shared, "overlap.json") for shared in found.overlap), None),
        "text": {model: result["text"] for model, result in results.items()},
        "metrics": {
            model: {task: record["metrics"] for task, record in result["tasks"].items()}
            for model, result in results.items()
        },
        "primary": {task: record["settings"]["primary"] for task, record in records.items()},
        "requests_cut": {task: record["cut"] for task, record in records.items() if record.get("cut")},
        "unparsed": {
            model: {task: record["unparsed"] for task, record in result["tasks"].items() if record["unparsed"]}
            for model, result in results.items()
        },
    }


def _cost(found: Found) -> dict[str, Any]:
    """What was cut, what was trained on, and what each stage took when it was built."""
    cut = Cut.load(found.cut.path / "cut.json")
    training: dict[str, Any] = next((_read(student, "training.json") for student in found.taught.student), {})
    rewrites = found.rewrites()
    manifests = {
        stage: [manifest.read(artifact.path) or {} for artifact in artifacts]
        for stage, artifacts in found.built().items()
    }
    built = manifests.get("train", manifests["prune"])[0]
    size = _read(found.cut, "size.json")
    for patch in found.patches:
        size |= _read(patch, "size.json")
    return {
        "cut": list(cut.kept),
        "blocks": cut.total,
        "no_attention": list(cut.no_attention),
        "no_feedforward": list(cut.no_feedforward),
        "depth": cut.name,
        "parameters": {model: sizes["parameters"] for model, sizes in size.items()},
        "cache_bytes": {model: sizes["cache_bytes"] for model, sizes in size.items()},
        "patch_unexplained": {k: v for patch in found.patches for k, v in _read(patch, "fit.json").items()},
        "examples": training.get("examples", 0),
        "supervised_tokens": training.get("supervised_tokens", 0),
        "steps": training.get("steps", 0),
        "tokens_per_second": training.get("tokens_per_second", 0),
        "dropped_rows": training.get("dropped_rows", 0),
        "written": next((_read(written, "written.json") for written in found.taught.written), None),
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
        "dequantised": origin(found.model.path),
        "dtype": built["spec"]["dtype"],
        "attention": built["spec"]["attention"],
        "versions": built["versions"],
        "device": built["device"],
        "threads": built["threads"],
    }


def _read(artifact: Artifact, name: str) -> Any:
    return json.loads((artifact.path / name).read_text(encoding="utf-8"))


def write(path: Path, content: Any) -> None:
    """Text as it is, anything else as JSON; the file appears complete or not at all."""
    manifest.replace_text(path, content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
