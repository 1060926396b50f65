"""What a run found, from its artifacts: the summary, and the files in the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from sddx.data.shards import read_rows
from sddx.evaluation.recovery import likelihoods, reported_chance, summarise
from sddx.evaluation.scored import clusters_of, compact
from sddx.files.shapes import FORMAT
from sddx.gguf.origin import origin
from sddx.records import CUT_FILE, REWRITES_FILE, Artifact, Cut, Rewrite
from sddx.report import table
from sddx.store import manifest

TRAINED = ("examples", "supervised_tokens", "steps", "tokens_per_second", "dropped_rows")


@dataclass(frozen=True)
class RunArtifacts:
    """What a run built, or found in the store, by name (`sddx.pipeline.Run` says what each is); of `results`, one
    for each of `subjects`, which are records of name and role; of `drafts`, one for each subject but the first and
    each of `prompts`, which are names; of `drifts`, one for each subject but the first, or none."""

    base: Artifact
    pruned: Artifact
    subjects: Sequence[Mapping[str, str]]
    results: Sequence[Artifact]
    data: Artifact | None = None
    scores: Artifact | None = None
    patch: Artifact | None = None
    answers: Sequence[Artifact] = ()
    rows: Sequence[Artifact] = ()
    captured: Sequence[Artifact] = ()
    student: Artifact | None = None
    mixed: Artifact | None = None
    shares: Artifact | None = None
    merged: Artifact | None = None
    prompts: Sequence[str] = ()
    drafts: Sequence[Artifact] = ()
    drifts: Sequence[Artifact] = ()
    written: Artifact | None = None
    overlap: Artifact | None = None

    @property
    def judged(self) -> dict[str, Artifact]:
        """The results by the name of the model."""
        return {each["name"]: result for each, result in zip(self.subjects, self.results, strict=True)}

    @property
    def drafted(self) -> dict[tuple[str, str], Artifact]:
        """What was found of drafts, by the name of the model and that of the prompts."""
        pairs = product([each["name"] for each in self.subjects[1:]], self.prompts)
        return dict(zip(pairs, self.drafts, strict=True))

    @property
    def drifted(self) -> dict[str, Artifact]:
        """How far each model moved, by its name."""
        names = [each["name"] for each in self.subjects[1:]]
        return dict(zip(names, self.drifts, strict=True)) if self.drifts else {}

    def built(self) -> dict[str, list[Artifact]]:
        """The artifacts that stages made, by stage; evaluations by what they evaluated."""
        one = {"prepare": self.data, "score": self.scores, "prune": self.pruned, "patch": self.patch}
        late = {"train": self.student, "train_mixed": self.mixed, "shares": self.shares, "merge": self.merged}
        late["written"] = self.written
        late |= {f"evaluate_{name}": result for name, result in self.judged.items()} | {"overlap": self.overlap}
        late |= {f"draft_{'_'.join(pair)}".removesuffix("_dataset"): made for pair, made in self.drafted.items()}
        late |= {f"drift_{name}": made for name, made in self.drifted.items()}
        stages = {stage: [made] if made else [] for stage, made in one.items()}
        stages |= {"distill": [*self.answers], "select": [shard for shard in self.rows if shard.stage == "select"]}
        stages |= {"capture": [*self.captured]}
        stages |= {stage: [made] if made else [] for stage, made in late.items()}
        return {stage: artifacts for stage, artifacts in stages.items() if artifacts}


def rewrites(shards: Sequence[Artifact]) -> list[Rewrite]:
    """The checked answers of these shards; none of reference data."""
    return read_rows(Rewrite, *(shard.path / REWRITES_FILE for shard in shards if shard.stage == "select"))


def conclude(report: Artifact, written: list[Rewrite], folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Write the run's results into its folder, print them with the answers that were `written`, and return the
    summary: `about` the run (its name, its store) and what its report says. The last line names the file."""
    summary = {"format": FORMAT, **about, **_read(report, "summary.json")}
    write(folder / "samples.json", (report.path / "samples.json").read_text(encoding="utf-8"))
    write(folder / "table.md", table.markdown(summary))
    write(folder / "summary.json", summary)
    console = Console(width=max(100, Console().width))  # narrower, numbers are cut off
    if written:
        table.acceptance(written, console)
    table.show(summary, console)
    return summary


def summarised(artifacts: RunArtifacts) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the run's artifacts say: the summary, and by model what comparisons need of every item."""
    results = {model: _read(result, "results.json") for model, result in artifacts.judged.items()}
    return {"subjects": artifacts.subjects, **_quality(artifacts, results), **_cost(artifacts)}, {
        model: compact(r) for model, r in results.items()
    }


def _quality(artifacts: RunArtifacts, results: dict[str, Any]) -> dict[str, Any]:
    """Scores, recoveries, and what scores do not show."""
    roles = {each["name"]: each["role"] for each in artifacts.subjects}
    trained = _read(artifacts.data, "dataset.json")["trains"] if artifacts.data else []
    records = results[artifacts.subjects[0]["name"]]["tasks"]
    chance = {task: record["chance"] for task, record in records.items()}
    part_of = {task: record["part_of"] for task, record in records.items()}
    apart = {part_of[task] for task, record in records.items() if record["apart"]}
    clusters = {task: clusters_of(record["samples"]) for task, record in records.items()}
    scores = {
        model: {task: [sample["score"] for sample in record["samples"]] for task, record in result["tasks"].items()}
        for model, result in results.items()
    }
    return {
        **summarise(
            scores, roles=roles, chance=chance, trained=trained, part_of=part_of, apart=apart, clusters=clusters
        ),
        "likelihoods": {model: likelihoods(r["tasks"], part_of, apart) for model, r in results.items()},
        "part_of": part_of,
        "chance": reported_chance(chance, part_of),
        "overlap": _read(artifacts.overlap, "overlap.json") if artifacts.overlap else None,
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


def _cost(artifacts: RunArtifacts) -> dict[str, Any]:
    """What was cut, what was trained on, what was done besides, and what each stage took when it was built."""
    return _cut(artifacts) | _training(artifacts) | _besides(artifacts) | _stages(artifacts)


def _cut(artifacts: RunArtifacts) -> dict[str, Any]:
    cut = Cut.load(artifacts.pruned.path / CUT_FILE)
    size = _read(artifacts.pruned, "size.json") | (_read(artifacts.patch, "size.json") if artifacts.patch else {})
    return {
        "cut": list(cut.kept),
        "blocks": cut.total,
        "no_attention": list(cut.no_attention),
        "no_feedforward": list(cut.no_feedforward),
        "depth": cut.name,
        "parameters": {model: sizes["parameters"] for model, sizes in size.items()},
        "cache_bytes": {model: sizes["cache_bytes"] for model, sizes in size.items()},
        "patch_unexplained": _read(artifacts.patch, "fit.json") if artifacts.patch else {},
    }


def _training(artifacts: RunArtifacts) -> dict[str, Any]:
    training: dict[str, Any] = _read(artifacts.student, "training.json") if artifacts.student else {}
    answers = rewrites(artifacts.rows[1:])
    of_all = _read(artifacts.mixed, "training.json") if artifacts.mixed else None
    return {
        **{name: training.get(name, 0) for name in TRAINED},
        "mixed": {name: of_all[name] for name in TRAINED} if of_all else None,
        "rollouts": training.get("rollouts"),
        "training_seconds": training.get("seconds"),
        "captured": _captured(artifacts.captured[1:]),
        "written": _read(artifacts.written, "written.json") if artifacts.written else None,
        "fallback_share": sum(bool(each.reason) for each in answers) / len(answers) if answers else None,
    }


def _besides(artifacts: RunArtifacts) -> dict[str, Any]:
    return {
        "merged": _read(artifacts.merged, "merge.json") if artifacts.merged else None,
        "searched": _read(artifacts.shares, "search.json") if artifacts.shares else None,
        "drafts": _drafts(artifacts),
        "drift": _drift(artifacts),
    }


def _stages(artifacts: RunArtifacts) -> dict[str, Any]:
    stages = artifacts.built()
    manifests = {stage: [manifest.read(each.path) or {} for each in made] for stage, made in stages.items()}
    built = manifests.get("train", manifests["prune"])[0]
    keys = {stage: [a.key for a in made] if len(made) > 1 else made[0].key for stage, made in stages.items()}
    return {
        "seconds": {stage: sum(m["seconds"] for m in made) for stage, made in manifests.items()},
        "peak_memory": {stage: max(m["peak_memory"] for m in made) for stage, made in manifests.items()},
        "artifacts": {"model": artifacts.base.key, **keys},
        "model_path": str(artifacts.base.path),
        "dequantised": origin(artifacts.base.path),
        **{name: built["spec"][name] for name in ("dtype", "attention")},
        **{name: built[name] for name in ("versions", "device", "threads")},
    }


def _captured(shards: Sequence[Artifact]) -> dict[str, Any] | None:
    """Of the answer tokens of the training rows, what their teacher's `k` likeliest tokens hold of its probability:
    the mean, and the share of tokens of which they hold above 99 %."""
    manifests = [_read(shard, "capture.json") for shard in shards]
    total = {name: sum(each["captured"][name] for each in manifests) for name in ("positions", "mass", "sure")}
    if not (tokens := total["positions"]):
        return None
    asked = {name: manifests[0]["origin"][name] for name in ("k", "temperature")}
    return {**asked, "positions": tokens, "mass": total["mass"] / tokens, "sure": total["sure"] / tokens}


def _drafts(artifacts: RunArtifacts) -> dict[str, dict[str, Any]]:
    """By the name of the model and that of the prompts, what it is worth as a draft."""
    drafts: dict[str, dict[str, Any]] = {}
    for (name, prompts), made in artifacts.drafted.items():
        drafts.setdefault(name, {})[prompts] = _read(made, "draft.json")
    return drafts


def _drift(artifacts: RunArtifacts) -> dict[str, dict[str, Any]]:
    """How far each model moved, by its name. Of answers that are learned nothing, where the student wrote them
    while it was trained."""
    moved = {name: _read(made, "drift.json") for name, made in artifacts.drifted.items()}
    if artifacts.student and _read(artifacts.student, "training.json").get("rollouts"):
        for sides in (each["surprise"] for each in moved.values()):
            for kinds in sides.values():
                kinds.pop("learned")
    return moved


def _read(artifact: Artifact, name: str) -> Any:
    return json.loads((artifact.path / name).read_text(encoding="utf-8"))


def write(path: Path, content: Any) -> None:
    """Text as it is, anything else as JSON; the file appears complete or not at all."""
    manifest.replace_text(path, content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
