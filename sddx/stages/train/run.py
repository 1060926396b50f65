"""train: the pruned model learns from the examples, with the unpruned one beside it where a term needs it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import sddx.training.loop  # noqa: F401  with this stage, so that an edit meanwhile changes nothing of what runs
from sddx.compression.compressed import Compressed, compress
from sddx.compression.kinds import read
from sddx.config.build import build
from sddx.data.encode import Encoded, encode_all, padding_id
from sddx.data.selfdata import end_ids
from sddx.data.templates import rewriting_prompt
from sddx.errors import UserError
from sddx.models.anatomy import is_adapted
from sddx.models.load import context_of, free_memory, load_model, load_tokenizer, text_config
from sddx.parallel.distributed import is_joined, rank
from sddx.parallel.launch import launch
from sddx.records import Artifact, Example
from sddx.runtime import Runtime, free_held
from sddx.stages.rows import examples_of, room
from sddx.students.cached import CachedTeacher, origin
from sddx.students.student import save_student
from sddx.students.teacher import SeparateTeacher, SharedTeacher, Teacher
from sddx.training.rollouts import Rollouts
from sddx.training.tuning import adapted_weights
from sddx.training.writer import Writer

log = logging.getLogger(__name__)


def train(
    out: Path,
    *,
    base: Artifact,
    held_out: Artifact,
    rows: Sequence[Artifact],
    teacher: Artifact | None = None,
    captured: Sequence[Artifact] = (),
    runtime: Runtime,
    loss: dict[str, Any],
    tuning: dict[str, Any],
    trainer: dict[str, Any],
    selfdata: dict[str, Any],
    max_length: int,
    seed: int,
    dtype: str,
    attention: str,
    teacher_cache: int | None = None,
    **compressions: Artifact | None,
) -> None:
    """Writes the student (an adapter or full weights, with its cut and base) and `training.json`; on several
    devices in processes of their own (`launch`), of which each loads the model and the first one writes.

    `rows`, and the `held_out` ones, are reference examples or rewrites; `compressions` are done to the base
    before it learns, and `teacher` is one that is not the unpruned model; `selfdata` says what becomes of refused
    rewrites, and `runtime.training` how the training is run. With an adapter the unpruned model is in the same
    weights, the compressions undone and the adapter off, and in 4 bit where `tuning.quantization` holds them so;
    any other teacher is loaded beside the student, and with strategy fsdp this one too where branches were
    removed or a patch was put in. With `teacher_cache` none is loaded: what it said of the rows' answer tokens, of
    so many likeliest tokens at each, is read from `captured`. Raises UserError where no row is left,
    TrainingDiverged where a loss is not finite, Interrupted after SIGTERM.
    """
    trainer = {**trainer, **runtime.training}
    free_memory()  # what the stages before held, and vLLM's engines
    free_held()
    sharded = trainer.get("strategy") == "fsdp"
    loading: dict[str, Any] = {"dtype": dtype, "attention": attention}
    if trainer.get("strategy", "single") != "single" and not is_joined():
        inputs: dict[str, Any] = dict(base=base, held_out=held_out, rows=rows, teacher=teacher, **compressions)
        spec: dict[str, Any] = dict(loss=loss, tuning=tuning, trainer=trainer, selfdata=selfdata, **loading)
        spec |= dict(captured=captured, teacher_cache=teacher_cache, max_length=max_length, seed=seed)
        launch(partial(train, out, **inputs, **spec), trainer["devices"], runtime)
        return
    objective, tokenizer = build(loss), load_tokenizer(base.path)
    learned = _learned(tokenizer, objective.rollouts, base.path, rows, held_out, selfdata, max_length)
    beside: Any = None
    if teacher_cache is not None:
        asked = {"k": teacher_cache, "temperature": objective.temperature, "max_length": learned.length}
        beside = _captured(captured, teacher or base, tokenizer, learned, **asked)

    # What is to be cut into shards may not fit on one device.
    load: Any = partial(load_model, device="cpu" if sharded else runtime.device, **loading)
    made = compress(load(base.path, quantization=tuning.get("quantization")), read(compressions))
    made.model = build(tuning)(made.model, seed)
    made.thaw()
    trains = adapted_weights(made.model)
    if rank() == 0:
        log.info(trains)
    if objective.needs_teacher and beside is None:
        beside = _teacher(load, made, base, teacher, sharded=sharded)
    if not isinstance(beside, SharedTeacher):
        made.whole = {}  # a large model's removed blocks are freed
    pad, more = padding_id(tokenizer), {}
    if objective.rollouts is not None:
        more["writer"] = _writer(made.model, objective.rollouts, tokenizer, learned, seed)
    with made.held(), _put_together(made):
        fitted = learned.rows, learned.held_out, pad, seed, out, runtime
        metrics = build(trainer)(made.model, beside, objective, made.cut, *fitted, **more)
    if rank() == 0:
        save_student(made, out, base=base.key)
        summary = metrics | {"dropped_rows": learned.dropped, "trains": trains}
        (out / "training.json").write_text(json.dumps(summary) + "\n", encoding="utf-8")


class Learned(NamedTuple):
    """What is learned from and judged by, as tokens; how many rows had none left; how long a row may be."""

    rows: list[Encoded]
    held_out: list[Encoded]
    dropped: int
    length: int


def _learned(
    tokenizer: Any,
    rollouts: Rollouts | None,
    base: Path,
    rows: Sequence[Artifact],
    held_out: Artifact,
    selfdata: dict[str, Any],
    max_length: int,
) -> Learned:
    """Raises UserError where no row is left."""
    examples, length = examples_of(rows, selfdata), room(base, max_length)
    context = context_of(text_config(base))
    encode = partial(_encoded, tokenizer, rollouts, max_length=length, context=context)
    encoded, dropped = encode(examples)
    _require_rows(encoded, examples, length)
    judged, _ = encode(examples_of([held_out], selfdata))
    return Learned(encoded, judged, dropped, length)


def _captured(
    captured: Sequence[Artifact], model: Artifact, tokenizer: Any, learned: Learned, **asked: Any
) -> CachedTeacher:
    """What a model said of these rows. Raises UserError where it was asked otherwise, or of others."""
    about = origin(model.key, tokenizer, vocabulary=text_config(model.path).vocab_size, **asked)
    teacher = CachedTeacher([each.path for each in captured], about)
    teacher.require([*learned.rows, *learned.held_out])
    return teacher


def _writer(model: Any, rollouts: Rollouts, tokenizer: Any, learned: Learned, seed: int) -> Writer:
    """By which the student writes answers to the rows of a step."""
    form: dict[str, Any] = {"max_length": learned.length, "ends": end_ids(model, tokenizer)}
    return Writer(model, rollouts, learned.rows, seed, pad_id=padding_id(tokenizer), **form)


def _teacher(
    load: Callable[..., Any], made: Compressed, base: Artifact, other: Artifact | None, *, sharded: bool
) -> Teacher:
    """The unpruned model in the student's own weights, where these are still as they were; else, or where it is
    another one, a model beside it."""
    if is_adapted(made.model) and other is None and not (made.has_twins and sharded):
        return SharedTeacher(made)
    return SeparateTeacher(load((other or base).path))


@contextmanager
def _put_together(made: Compressed) -> Iterator[None]:
    """Weights that shards were put together to in new ones, while the body trained, are those that are saved."""
    names = {id(weight): name for name, weight in made.model.named_parameters()}
    yield
    if rank() == 0:
        for gap, weight in made.own.items():
            if weight.requires_grad:
                made.own[gap] = made.model.get_parameter(names[id(weight)])


def _encoded(
    tokenizer: Any, rollouts: Rollouts | None, examples: Sequence[Example], *, max_length: int, context: int | None
) -> tuple[list[Encoded], int]:
    """The examples as tokens, and how many were dropped: those without a label within `max_length`; and those whose
    rewriting prompt, where the teacher reads one, leaves no room for an answer in the model's context."""
    if rollouts is None or (template := rollouts.rewrite) is None:
        return encode_all(tokenizer, examples, max_length=max_length)

    def shown(example: Example) -> str:
        return rewriting_prompt(template, example.prompt, example.response)

    rows, dropped = encode_all(tokenizer, examples, max_length=max_length, shown=shown)
    longest = [max(row.supervised, min(rollouts.last, max_length - len(row.prompt))) for row in rows]
    kept = [
        row
        for row, answer in zip(rows, longest, strict=True)
        if context is None or len(row.shown) + answer <= context
    ]
    return kept, dropped + len(rows) - len(kept)


def _require_rows(rows: Sequence[Any], examples: Sequence[Example], max_length: int) -> None:
    """Raises UserError where nothing is left to train on, and says what took it away."""
    if not examples:
        raise UserError(
            "No example is left to train on: all answers were refused, with selfdata.fallback=drop. Use "
            "selfdata.fallback=reference, or another rewriting template (dataset.rewrite) or check (dataset.check)."
        )
    if not rows:
        raise UserError(
            f"No row has an answer left to train on after truncation. Given: {len(examples)} rows, max_length="
            f"{max_length}. Raise max_length above the length of the prompts."
        )
