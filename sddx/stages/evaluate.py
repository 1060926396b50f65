"""evaluate: any model, unpruned, pruned or recovered, through the same harness."""

from __future__ import annotations

import json
from functools import partial
from operator import methodcaller
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sddx.build import build
from sddx.data.encode import by_length, text_batches
from sddx.evaluation.harness import responses
from sddx.evaluation.task_files import placed
from sddx.evaluation.text import divergence, mean_length, perplexity, repetition
from sddx.models.anatomy import is_adapted
from sddx.models.load import context_of, free_memory, frozen_model, load_tokenizer
from sddx.models.plain import write_apart, write_merged
from sddx.models.student import Student, load_student
from sddx.models.teacher import SeparateTeacher, SharedTeacher, Teacher
from sddx.parallel.launch import sharded
from sddx.records import Artifact, Cut
from sddx.runtime import Runtime
from sddx.store import RESUME, keep_rows

ANSWERED = Path(RESUME, "answers.jsonl")


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
    texts are read from; `evaluation.data_dir` names one of them by its key. `text.kl` is KL(unpruned || model) in
    nats a token on held-out text, and `text.perplexity` the model's on the same tokens; repetition and length are
    those of the answers. Where the evaluation's backend is vllm, the scores are those of the merged weights, or by
    `evaluation.vllm.adapter` of the adapter beside them; KL and perplexity are still those of the model as it was
    trained. What was answered when the stage is interrupted is in `out/resume`, and not asked again.
    """
    keep_rows(out, 0)
    given, evaluation = {artifact.stage: artifact.path for artifact in inputs}, placed(evaluation, inputs)
    how = {"dtype": dtype, "attention": attention}
    apart = None
    if evaluation.get("backend") == "vllm":
        apart = _by_vllm(out, model, given, evaluation, {**how, "device": runtime.roomy}, runtime.quiet)
    results = _results(out, model, given, evaluation, text, how, apart, runtime=runtime)
    (out / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    for task, record in results["tasks"].items():
        runtime.log({f"evaluate/{task}": record["score"]})
    runtime.log({"evaluate/perplexity": results["text"]["perplexity"]})


@sharded
def _results(
    out: Path,
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
    results = apart or build(evaluation)(judged, tokenizer, runtime, out / ANSWERED)
    texts = list(text_batches(tokenizer, build(text), context=context_of(judged.config)))
    batches = [batch for _, batch in by_length(texts)]
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
    model: Artifact,
    given: dict[str, Path],
    evaluation: dict[str, Any],
    how: dict[str, Any],
    quiet: bool,
) -> dict[str, Any]:
    """The scores by vLLM, which reads folders: the unpruned model's own, or what is gone afterwards, a model's
    merged weights or those without its adapter and the adapter. None of our models is in memory meanwhile."""
    engine = build(evaluation["vllm"])
    settings = {"evaluation": evaluation, "dtype": how["dtype"], "answered": out / ANSWERED, "quiet": quiet}
    if "prune" not in given:
        return engine.judge(model.path, **settings)
    with TemporaryDirectory(dir=out) as name:
        written = _written(Path(name), model, given, how, apart=engine.adapter == "apart")
        return engine.judge(*written, **settings)


def _written(
    folder: Path, model: Artifact, given: dict[str, Path], how: dict[str, Any], *, apart: bool
) -> tuple[Path, Path | None]:
    """The folders of a model on disk and, where it has one and that is to be `apart`, of its adapter."""
    student = _student(model, given, how).model
    if apart and is_adapted(student):
        write_apart(student, model.path, given["train"], folder)
        return folder / "base", folder / "adapter"
    write_merged(student, model.path, folder)
    return folder, None


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
