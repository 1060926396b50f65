"""evaluate: any model, unpruned, pruned or recovered, through the same harness."""

from __future__ import annotations

import json
from functools import partial
from operator import methodcaller
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sddx.build import build
from sddx.data.encode import text_batches
from sddx.evaluation.harness import responses
from sddx.evaluation.text import divergence, mean_length, perplexity, repetition
from sddx.models.load import free_memory, frozen_model, load_tokenizer
from sddx.models.plain import write_merged
from sddx.models.student import Student, load_student
from sddx.models.teacher import SeparateTeacher, SharedTeacher, Teacher
from sddx.parallel.launch import sharded
from sddx.records import Artifact, Cut
from sddx.runtime import Runtime
from sddx.store import RESUME, keep_rows


def evaluate(
    out: Path,
    model: Artifact,
    *inputs: Artifact,
    runtime: Runtime,
    evaluation: dict[str, Any],
    text: dict[str, Any],
    dtype: str,
    attention: str,
) -> None:
    """Writes `results.json`: lm-eval's scores with every item, and under `text` what scores do not show.

    `inputs` may hold a cut (the pruned model), a cut and a student (the recovered one), or neither (the
    unpruned one), and the patch that stands in for what was cut; all other inputs are files that tasks and
    texts are read from. `text.kl` is KL(unpruned || model) in nats a token on held-out text, and
    `text.perplexity` the model's on the same tokens; repetition and length are those of the answers. Where the
    evaluation's backend is vllm, the scores are those of the merged weights; KL and perplexity are still those of
    the model as it was trained. What was answered when the stage is interrupted is in `out/resume`, and not asked
    again.
    """
    keep_rows(out, 0)
    answered = out / RESUME / "answers.jsonl"
    given = {artifact.stage: artifact.path for artifact in inputs}
    how = {"dtype": dtype, "attention": attention}
    apart = None
    if evaluation.get("backend") == "vllm":
        apart = _by_vllm(out, answered, model, given, evaluation, {**how, "device": runtime.roomy}, runtime.quiet)
    results = _results(answered, model, given, evaluation, text, how, apart, runtime=runtime)
    (out / "results.json").write_text(json.dumps(results) + "\n")
    for task, record in results["tasks"].items():
        runtime.log({f"evaluate/{task}": record["score"]})
    runtime.log({"evaluate/perplexity": results["text"]["perplexity"]})


@sharded
def _results(
    answered: Path,
    model: Artifact,
    given: dict[str, Path],
    evaluation: dict[str, Any],
    text: dict[str, Any],
    how: dict[str, Any],
    apart: dict[str, Any] | None,
    *,
    runtime: Runtime,
) -> dict[str, Any]:
    """Scores, unless they were found `apart`, and what they do not show."""
    tokenizer, how = load_tokenizer(model.path), {**how, "device": runtime.device}
    judged, teacher = _beside(model, given, how) if "prune" in given else (frozen_model(model.path, **how), None)
    results = apart or build(evaluation)(judged, tokenizer, runtime, answered)
    batches = list(text_batches(tokenizer, build(text)))
    moved = partial(map, methodcaller("to", runtime.device), batches)
    answers = responses(results)
    results["text"] = {
        "kl": divergence(teacher, judged, moved()) if teacher else 0.0,
        "perplexity": perplexity(judged, moved()),
        "repetition": repetition(answers),
        "mean_length": mean_length(answers),
    }
    return results


def _by_vllm(
    out: Path,
    answered: Path,
    model: Artifact,
    given: dict[str, Path],
    evaluation: dict[str, Any],
    how: dict[str, Any],
    quiet: bool,
) -> dict[str, Any]:
    """The scores by vLLM, which reads a folder: the unpruned model's own, or one of merged weights that is gone
    afterwards. None of our models is in memory meanwhile."""
    engine = build(evaluation["vllm"])
    if "prune" not in given:
        return engine.judge(model.path, evaluation, how["dtype"], answered, quiet=quiet)
    with TemporaryDirectory(dir=out) as name:
        write_merged(_student(model, given, how).model, model.path, Path(name))
        return engine.judge(Path(name), evaluation, how["dtype"], answered, quiet=quiet)


def _student(model: Artifact, given: dict[str, Path], how: dict[str, Any]) -> Student:
    """The pruned or recovered model."""
    free_memory()
    cut, trained, patch = Cut.load(given["prune"] / "cut.json"), given.get("train"), given.get("patch")
    return load_student(model.path, trained, cut=cut, base=model.key, patch=patch, **how)


def _beside(model: Artifact, given: dict[str, Path], how: dict[str, Any]) -> tuple[Any, Teacher]:
    """The pruned or recovered model, and the unpruned one to compare it with: in the same weights where they
    are still there, so that a large model is held once."""
    student = _student(model, given, how)
    if student.unpruned is None:
        return student.model, SeparateTeacher(frozen_model(model.path, **how))
    cut = Cut.load(given["prune"] / "cut.json")
    return student.model, SharedTeacher(student.model, student.unpruned, cut)
