"""evaluate: any model, unpruned, pruned or recovered, through the same harness."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sddx.compression.compressed import Compressed, Compression
from sddx.compression.kinds import read
from sddx.config.build import build
from sddx.data.encode import by_length, text_batches
from sddx.evaluation.scored import responses
from sddx.evaluation.task_files import placed
from sddx.evaluation.text import held_out
from sddx.models.anatomy import is_adapted
from sddx.models.load import context_of, free_memory, frozen_model, load_tokenizer
from sddx.parallel.launch import sharded
from sddx.records import Artifact
from sddx.runtime import Runtime
from sddx.statistics.answers import mean_length, repetition
from sddx.store import RESUME, keep_rows
from sddx.students.plain import write_apart, write_merged
from sddx.students.student import load_student
from sddx.students.teacher import SeparateTeacher, SharedTeacher, Teacher

ANSWERED = Path(RESUME, "answers.jsonl")


@dataclass(frozen=True)
class Made:
    """What the evaluated model is made of."""

    base: Artifact
    done: tuple[Compression, ...]
    student: Artifact | None

    def load(self, loading: dict[str, Any]) -> Compressed:
        """The pruned or recovered model."""
        free_memory()
        trained = self.student.path if self.student else None
        return load_student(self.base.path, trained, done=self.done, base=self.base.key, **loading)

    def beside(self, loading: dict[str, Any]) -> tuple[Any, Teacher]:
        """The pruned or recovered model, and the unpruned one to compare it with: in the same weights where they
        are still there, so that a large model is held once."""
        student = self.load(loading)
        if not student.whole:
            return student.model, SeparateTeacher(frozen_model(self.base.path, **loading))
        return student.model, SharedTeacher(student)

    def write(self, folder: Path, loading: dict[str, Any], *, apart: bool) -> tuple[Path, Path | None]:
        """The folders of a model on disk and, where it has one and that is to be `apart`, of its adapter."""
        model = self.load(loading).model
        if apart and is_adapted(model) and self.student:
            write_apart(model, self.base.path, self.student.path, folder)
            return folder / "base", folder / "adapter"
        write_merged(model, self.base.path, folder)
        return folder, None


def evaluate(
    out: Path,
    *,
    base: Artifact,
    files: Sequence[Artifact],
    student: Artifact | None = None,
    runtime: Runtime,
    evaluation: dict[str, Any],
    text: dict[str, Any],
    dtype: str,
    attention: str,
    **compressions: Artifact | None,
) -> None:
    """Writes `results.json`: lm-eval's scores with every item, and under `text` what scores do not show.

    Judged is the pruned model where there are `compressions`, the recovered one where there is a `student` as well,
    and else the unpruned one. `files` are those that tasks and texts are read
    from; `evaluation.data_dir` names one of them by its key. `text.kl` is KL(unpruned || model) in nats a token on
    held-out text, and `text.perplexity` the model's on the same tokens; repetition and length are those of the
    answers. Where the evaluation's backend is vllm, the scores are those of the merged weights, or by
    `evaluation.vllm.adapter` of the adapter beside them; KL and perplexity are still those of the model as it was
    trained. What was answered when the stage is interrupted is in `out/resume`, and not asked again.
    """
    keep_rows(out, 0)
    evaluation, made = placed(evaluation, files), Made(base, read(compressions), student)
    loading = {"dtype": dtype, "attention": attention}
    apart = None
    if evaluation.get("backend") == "vllm":
        apart = _by_vllm(out, made, evaluation, {**loading, "device": runtime.roomy}, runtime.quiet)
    results = _results(out, made, evaluation, text, loading, apart, runtime=runtime)
    (out / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    for task, record in results["tasks"].items():
        runtime.log({f"evaluate/{task}": record["score"]})
    runtime.log({"evaluate/perplexity": results["text"]["perplexity"]})


@sharded
def _results(
    out: Path,
    made: Made,
    evaluation: dict[str, Any],
    text: dict[str, Any],
    loading: dict[str, Any],
    apart: dict[str, Any] | None,
    *,
    runtime: Runtime,
) -> dict[str, Any]:
    """Scores, unless they were found `apart`, and what they do not show."""
    folder, loading = made.base.path, {**loading, "device": runtime.device}
    tokenizer = load_tokenizer(folder)
    judged, teacher = made.beside(loading) if made.done else (frozen_model(folder, **loading), None)
    results = apart or build(evaluation)(judged, tokenizer, runtime, out / ANSWERED)
    texts = list(text_batches(tokenizer, build(text), context=context_of(judged.config)))
    batches = [batch for _, batch in by_length(texts)]
    moved = map(methodcaller("to", runtime.device), batches)
    answers = responses(results)
    results["text"] = {
        **held_out(judged, moved, teacher),
        "repetition": repetition(answers),
        "mean_length": mean_length(answers),
    }
    return results


def _by_vllm(
    out: Path,
    made: Made,
    evaluation: dict[str, Any],
    loading: dict[str, Any],
    quiet: bool,
) -> dict[str, Any]:
    """The scores by vLLM, which reads folders: the unpruned model's own, or what is gone afterwards, a model's
    merged weights or those without its adapter and the adapter. None of our models is in memory meanwhile."""
    engine = build(evaluation["vllm"])
    settings = {"evaluation": evaluation, "dtype": loading["dtype"], "answered": out / ANSWERED, "quiet": quiet}
    if not made.done:
        return engine.judge(made.base.path, **settings)
    with TemporaryDirectory(dir=out) as name:
        written = made.write(Path(name), loading, apart=engine.adapter == "apart")
        return engine.judge(*written, **settings)
