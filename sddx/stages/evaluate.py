"""evaluate: any model, unpruned, pruned or recovered, through the same harness."""

from __future__ import annotations

import json
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from sddx.build import build
from sddx.data.encode import text_batches
from sddx.evaluation.harness import responses
from sddx.evaluation.text import divergence, mean_length, perplexity, repetition
from sddx.models.load import frozen_model, load_tokenizer
from sddx.models.student import load_student
from sddx.models.teacher import SeparateTeacher, SharedTeacher, Teacher
from sddx.records import Artifact, Cut
from sddx.runtime import Runtime

BATCH, MAX_LENGTH = 32, 2048


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
    `text.perplexity` the model's on the same tokens; repetition and length are those of the answers.
    """
    tokenizer = load_tokenizer(model.path)
    how = {"dtype": dtype, "attention": attention, "device": runtime.device}
    given = {artifact.stage: artifact.path for artifact in inputs}
    if "prune" in given:
        judged, teacher = _student(model, given, how)
    else:
        judged, teacher = frozen_model(model.path, **how), None
    results = build(evaluation)(judged, tokenizer, runtime)
    batches = list(text_batches(tokenizer, build(text), max_length=MAX_LENGTH, batch_size=BATCH))
    moved = partial(map, methodcaller("to", runtime.device), batches)
    answers = responses(results)
    results["text"] = {
        "kl": divergence(teacher, judged, moved()) if teacher else 0.0,
        "perplexity": perplexity(judged, moved()),
        "repetition": repetition(answers),
        "mean_length": mean_length(answers),
    }
    (out / "results.json").write_text(json.dumps(results) + "\n")
    for task, record in results["tasks"].items():
        runtime.log({f"evaluate/{task}": record["score"]})
    runtime.log({"evaluate/perplexity": results["text"]["perplexity"]})


def _student(model: Artifact, given: dict[str, Path], how: dict[str, Any]) -> tuple[Any, Teacher]:
    """The pruned or recovered model, and the unpruned one to compare it with: in the same weights where they
    are still there, so that a large model is held once."""
    frozen_model.cache_clear()
    cut = Cut.load(given["prune"] / "cut.json")
    trained, patch = given.get("train"), given.get("patch")
    student = load_student(model.path, trained, cut=cut, base=model.key, patch=patch, **how)
    if student.unpruned is None:
        return student.model, SeparateTeacher(frozen_model(model.path, **how))
    return student.model, SharedTeacher(student.model, student.unpruned, cut)
