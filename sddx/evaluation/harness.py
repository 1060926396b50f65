"""lm-eval in process: the same harness for the unpruned, the pruned and the recovered model.

Importing this module is cheap; lm-eval and torch are imported by `evaluate`. Behaviour that is relied on was
read in lm-eval 0.4.13.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sddx.errors import UserError
from sddx.evaluation.items import cluster_of, draw
from sddx.evaluation.scored import numbers, record, short_digest
from sddx.evaluation.seeds import seeded
from sddx.evaluation.task_files import as_dataset, folder_of
from sddx.evaluation.tasks import (
    OWN_TASKS,
    check_tasks,
    configure,
    load,
    named_in_files,
    new_tokens,
    not_texts,
    require_room,
    said,
    tell,
    text_of,
)
from sddx.records import Count, Natural, Share, Tasks
from sddx.runtime import Runtime
from sddx.statistics.intervals import expected_half_width, independent

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# What runs the model, and the distribution whose version is recorded. Their numbers are never compared.
BACKENDS = {"hf": "transformers", "vllm": "vllm"}
# The tokens of a text that is only scored, beyond the context: its last is predicted and not read by transformers,
# and vLLM must write one more.
SPARE = {"hf": 1, "vllm": -1}
LOOKED_AT = 16  # items of a task whose prompts are looked at before any work


def json_lines(*, data_files: Mapping[str, str], config_source: str, **metadata: Any) -> dict[str, Any]:
    """The data of a task whose JSONL files lie beside its YAML, as an lm-eval `custom_dataset`:

        custom_dataset: !function sddx.evaluation.harness.json_lines
        dataset_kwargs: {data_files: {test: arithmetic.jsonl}}

    Paths are relative to the YAML (lm-eval hands over its path as `config_source`, with the rest of the
    YAML's metadata), not to the working directory, and nothing is written to the cache of `datasets`.
    Returns one Dataset per split. Raises UserError for a file that is not there, and for the line that is no row.
    """
    from sddx.data.tables import read_table

    files = {split: Path(config_source).parent / name for split, name in data_files.items()}
    return {split: as_dataset(read_table(file, "dataset_kwargs.data_files"), file) for split, file in files.items()}


def require_tasks(
    setting: str = "evaluation",
    *,
    tasks: Sequence[str],
    include: str | None = None,
    split: Mapping[str, str] | None = None,
    shots: int | Mapping[str, int] | None = None,
    primary: Mapping[str, str] | None = None,
    chance: Mapping[str, float | None] | None = None,
    limit: int | Mapping[str, int] | None = None,
    cluster: Mapping[str, str] | None = None,
    apart: Sequence[str] = (),
    data_dir: str | None = None,
) -> None:
    """Raise UserError, with all that is wrong, where tasks cannot be evaluated by these settings, which stand under
    `setting`. No model is needed, and nothing is downloaded.

    What is looked at: all documents of tasks whose data is in files, the first document of a task of the hub whose
    rows are here, and the YAML of all others. The package's own tasks as they are were looked at in its tests, so
    that a run of them pays nothing; others pay about 0.3 ms an item, and lm-eval's import.
    """
    by_task: dict[str, Any] = {"limit": limit, "shots": shots, "primary": primary, "chance": chance}
    by_task |= {"split": split, "cluster": cluster}
    check_tasks(tasks, include, setting=setting, apart=apart, **by_task)
    require_counted(tasks, apart, setting)
    folder_of(data_dir, setting)
    as_tested = include is data_dir is None and not (shots or primary or split or cluster)
    if as_tested and set(tasks) <= named_in_files([OWN_TASKS]):
        return
    from sddx.evaluation.trial import tried

    with _calm(True), seeded():
        if wrong := tried(tasks, include, setting, {**by_task, "apart": apart}, data_dir):
            raise UserError(*wrong)


def require_counted(tasks: Sequence[str], apart: Sequence[str], setting: str = "evaluation") -> None:
    """Raise UserError where no task is left for the averages, or what is shown `apart` is no name."""
    if wrong := not_texts(apart, f"{setting}.apart"):
        raise UserError(*wrong)
    if set(tasks) <= set(apart):
        raise UserError(
            f"{setting}.apart={list(apart)} leaves no task for the average. Name a task that counts in "
            f"{setting}.tasks, or set {setting}.apart=[]."
        )


def _require_sound(tasks: Mapping[str, Any]) -> None:
    """Raise UserError where tasks cannot be scored, before a model runs over them for hours. Their first documents
    are tried, also those that were not here when the configuration was checked."""
    from sddx.evaluation.trial import mistakes

    with seeded():
        if wrong := list(mistakes(tasks, every=False)):
            raise UserError(*wrong)


def evaluate(
    model: PreTrainedModel | LM,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
    answered: Path | None = None,
    *,
    tasks: Tasks,
    include: str | None = None,
    batch_size: Count = 32,
    chat_template: bool = True,
    shots: Natural | Mapping[str, Natural] | None = None,
    primary: Mapping[str, str] | None = None,
    max_new_tokens: Count | None = None,
    chance: Mapping[str, Share | None] | None = None,
    limit: Count | Mapping[str, Count] | None = None,
    split: Mapping[str, str] | None = None,
    data_dir: str | None = None,
    side: Literal["report", "selection", None] = None,
    cluster: Mapping[str, str] | None = None,
    apart: Sequence[str] = (),
    generation_config: Literal["neutral", "model"] = "neutral",
    encoding: Literal["same", "lm_eval"] = "same",
    backend: Literal["hf", "vllm"] = "hf",
    vllm: Any = None,
) -> dict[str, Any]:
    """Run lm-eval on the model where it lies (its device), and keep what every item scored. The model is afterwards
    as it was.

    What the model answers is added to the file `answered`, and what is there is not asked again (`answers`).
    With `backend` vllm, the model is lm-eval's own around an engine, which makes its own batches; the settings of
    the engine, `vllm`, are used where it is made (sddx.engines.judging).

    `tasks` are lm-eval's names, groups included. What is given by task is given by these names, and holds for all
    parts of a group: `shots`, a task's number of examples (or one number for all that do not fix 0 themselves,
    which is lm-eval's rule); `primary`, the reported metric ("acc_norm,none"); `chance`, the score of guessing
    (null: not known), where the task's own metadata does not say; `limit`, how many items (or one number for
    each), drawn with a fixed seed and in equal numbers from the parts of a group; `split`, the split of its data
    whose items are evaluated (not named: the task's own), of which none is an example for itself; `cluster`, a
    column of its documents or a template of columns, as lm-eval has them: items that share its value are one draw
    for errors and intervals, not several.

    `data_dir` is a folder of rows in the hub's columns, which is then not asked (task_files). Of the items, those
    on one `side` alone are evaluated, about seven of nine for the report and two for the selection of anything,
    whatever the limit (items.side_of); None: all. Tasks that stand `apart` are evaluated as the others and left out
    of all averages.

    Answers are greedy where a task does not ask for sampling itself: of the model's own settings of generation none
    is used but its end tokens (`generation_config` neutral). Prompts are the tokens that scoring, self-data and
    training see (`encoding` same; sddx.data.encode). lm-eval's command line lets penalties and lengths of the model
    change its answers, and reads what the tokenizer puts before and after a text: `generation_config` model and
    `encoding` lm_eval do as it does, for comparison.

    Returns {"tasks": {task: record}, "groups": lm-eval's own group figures (of the items that were drawn),
    "batch_size", "truncated", "backend": its name and version}. A record holds `score` (mean of the primary
    metric), `stderr`, `chance`, `n`, `metrics`, `bits_per_byte` and `margin` (means; None where there is none, see
    sddx.evaluation.right_answers), `unparsed` (share of answers in which a filter found nothing, by filter),
    `part_of` (the name in `tasks`), `apart`, `settings` (all that, beside the items, makes two evaluations
    comparable) and `samples`, one dict per item; `cut` counts its requests that did not fit the model and lost
    their beginning, which `truncated` adds up.

    Raises UserError for an unknown task, metric or split, data that is not there, a tokenizer without a chat
    template or with one that drops the tasks' descriptions, an answer that is longer than the model's context or
    has no token, or a task of whose requests more than half do not fit it.
    """
    from sddx.evaluation.answers import Resumed
    from sddx.evaluation.prompts import Fitting
    from sddx.models.generation import neutral

    require_counted(tasks, apart)
    with _calm(runtime.quiet), seeded():
        loaded, part_of = load(tasks, include, split, data_dir=data_dir)
        overrides = {"primary": primary, "chance": chance, "cluster": cluster}
        if chat_template:
            _require_template(tokenizer, loaded["tasks"], part_of)
        configure(loaded["tasks"], part_of, shots=shots, max_new_tokens=max_new_tokens, metadata=overrides)
        lm: Any = model if backend == "vllm" else _by_transformers(model, tokenizer, batch_size, encoding)
        _require_sound(loaded["tasks"])
        require_room(_answers(loaded["tasks"]), lm.max_length)
        drawn = draw(loaded["tasks"], part_of, limit, side)
        lm = Fitting(Resumed(lm, answered) if answered else lm, SPARE[backend])
        if not runtime.quiet:
            _announce(_precision(loaded["tasks"], part_of, drawn, apart))
        with neutral(model) if (generation_config, backend) == ("neutral", "hf") else contextlib.nullcontext():
            raw = _scored(lm, loaded, drawn, chat_template)
    shared = {"chat_template": _template(tokenizer) if chat_template else None, "backend": backend}
    shared |= {"generation_config": generation_config, "encoding": encoding, "side": side}
    return {
        "tasks": {
            name: record(task, raw, part_of[name], shared) | {"cut": lm.cut[name], "apart": part_of[name] in apart}
            for name, task in loaded["tasks"].items()
        },
        "groups": {name: numbers(metrics) for name, metrics in raw.get("groups", {}).items()},
        "batch_size": lm.batch_size,
        "truncated": lm.cut.total(),
        "backend": {"name": backend, "version": metadata.version(BACKENDS[backend])},
    }


def _scored(
    lm: LM, loaded: Mapping[str, Any], drawn: Mapping[str, list[int]] | None, chat_template: bool
) -> dict[str, Any]:
    """lm-eval's own results over the items that were drawn. By `evaluate`, not `simple_evaluate`, which runs pip
    and git for a report of the environment each time."""
    from lm_eval import evaluator

    how: dict[str, Any] = {"apply_chat_template": chat_template, "fewshot_as_multiturn": chat_template}
    raw = evaluator.evaluate(lm, loaded, samples=drawn, bootstrap_iters=0, log_samples=True, **how)
    if raw is None:
        raise RuntimeError("lm-eval gives results on the first process only")
    return raw


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of the chat template and of its settings."""
    from sddx.data.encode import TEMPLATE_SETTINGS

    return short_digest(json.dumps([tokenizer.chat_template, TEMPLATE_SETTINGS], sort_keys=True))


def _answers(tasks: Mapping[str, Any]) -> dict[str, int]:
    """How long the answers of tasks may be that ask for any."""
    written = {name: task for name, task in tasks.items() if task.OUTPUT_TYPE == "generate_until"}
    return {name: new_tokens(task.get_config("generation_kwargs")) for name, task in written.items()}


def require_prompts_fit(
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    *,
    tasks: Sequence[str],
    include: str | None,
    chat_template: bool,
    shots: int | Mapping[str, int] | None,
    split: Mapping[str, str] | None,
    max_new_tokens: int | None,
    data_dir: str | None = None,
) -> None:
    """Raise UserError where `max_new_tokens` leave no room in the model's context for the first prompts of a task,
    by the rule of `evaluate` and before any work. Costs nothing where they take less than half of it."""
    if max_new_tokens is None or 2 * max_new_tokens < context:
        return
    from sddx.evaluation.prompts import Fitting, Reader

    with _calm(True), seeded():
        loaded, part_of = load(tasks, include, split, data_dir=data_dir)
        written = {name: task for name, task in loaded["tasks"].items() if task.OUTPUT_TYPE == "generate_until"}
        configure(written, part_of, shots=shots, max_new_tokens=max_new_tokens, metadata={})
        reader = Fitting(Reader(tokenizer, context), SPARE["hf"])
        rendered = reader.apply_chat_template if chat_template else None
        asked = {"apply_chat_template": chat_template, "fewshot_as_multiturn": chat_template}
        for task in written.values():
            task.build_all_requests(limit=LOOKED_AT, chat_template=rendered, **asked)
        reader.generate_until([instance for task in written.values() for instance in task.instances])


def _by_transformers(model: Any, tokenizer: Any, batch_size: int, encoding: str) -> LM:
    """lm-eval's model around one of transformers. The batch size must be given here: lm-eval ignores any other for
    a model that is handed over."""
    from lm_eval.models.huggingface import HFLM

    from sddx.data.encode import TEMPLATE_SETTINGS
    from sddx.evaluation.prompts import SameTokensHFLM

    reads = SameTokensHFLM if encoding == "same" else HFLM
    options: dict[str, Any] = {"softmax_dtype": "float32", "chat_template_args": TEMPLATE_SETTINGS}
    return reads(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **options)


def _require_template(tokenizer: Any, tasks: Mapping[str, Any], part_of: Mapping[str, str]) -> None:
    """Raise UserError where no chat template can be used, or one drops the tasks' descriptions."""
    from sddx.data.encode import require_system_turn, require_template

    try:
        require_template(tokenizer)
    except UserError as error:
        raise UserError(f"{error} Or set evaluation.chat_template=false.") from error
    described = [part_of[name] for name, task in tasks.items() if task.get_config("description")]
    require_system_turn(tokenizer, dict.fromkeys(described))


def _precision(
    tasks: Mapping[str, Any],
    part_of: Mapping[str, str],
    drawn: Mapping[str, list[int]] | None,
    apart: Sequence[str] = (),
) -> str:
    """How sure the scores to come can be, in points, before the first model is run; averages without what stands
    `apart`."""
    items = {name: _judged(name, task, drawn) for name, task in tasks.items()}
    sure = {name: independent(_clusters(tasks[name], places)) for name, places in items.items()}
    counted = {name: number for name, number in sure.items() if part_of[name] not in apart}
    widths = {**expected_half_width(sure, part_of), **expected_half_width(counted, part_of)}
    shown = ", ".join(f"{name} {100 * width:.1f}" for name, width in widths.items())
    total = sum(map(len, items.values()))
    return f"{total:,} items. Half-widths of 95 % intervals to expect, in points, at most: {shown}."


def _judged(name: str, task: Any, drawn: Mapping[str, list[int]] | None) -> Sequence[int]:
    return range(len(task.eval_docs)) if drawn is None else drawn[name]


def _clusters(task: Any, items: Sequence[int]) -> Sequence[Any]:
    """For each item what tells the draw that it belongs to: its cluster's or its own."""
    documents = task.eval_docs  # once: each asking reads them all anew
    return [cluster_of(task, documents[item]) or item for item in items] if said(task).get("cluster") else items


@cache  # said once for the models that a run compares
def _announce(line: str) -> None:
    logger.info(line)


@contextlib.contextmanager
def _calm(quiet: bool) -> Iterator[None]:
    """Hold back lm-eval's chatter. Its warnings of prompts that were cut are told by `Fitting`, as a count.

    Its bars for building contexts carry no name and last no time, as does that for looking up known answers, so
    only those for requests are shown. Templates are compiled once, and not for each document, which takes longer
    than all else that is done with one.
    """
    import lm_eval.api.model
    import lm_eval.api.task
    from lm_eval.utils import env

    parent = logging.getLogger("lm_eval")
    bars = lm_eval.api.task.tqdm, lm_eval.api.model.tqdm
    propagate, handlers = parent.propagate, parent.handlers
    parent.propagate, parent.handlers = False, [logging.NullHandler()]
    lm_eval.api.task.tqdm = lambda items, total: items  # type: ignore[assignment]
    lm_eval.api.model.tqdm = lambda items, desc, **options: (  # type: ignore[assignment]
        bars[1](items, desc=desc, **options) if options else items
    )
    compiled = env.from_string
    env.from_string = cache(compiled)  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
            yield
    finally:
        env.from_string = compiled  # type: ignore[method-assign]
        lm_eval.api.task.tqdm, lm_eval.api.model.tqdm = bars
        parent.propagate, parent.handlers = propagate, handlers


def task_texts(
    tasks: Sequence[str],
    include: str | None,
    limit: Any,
    split: Mapping[str, str] | None,
    *,
    data_dir: str | None = None,
    side: str | None = None,
    cluster: Mapping[str, str] | None = None,
) -> dict[str, list[str]]:
    """The text of every item that an evaluation of these tasks looks at, by task: its prompt and its target, or
    all its choices, without few-shot examples. Raises UserError as `evaluate` does."""
    with _calm(True), seeded():
        loaded, part_of = load(tasks, include, split, data_dir=data_dir)
        tell(loaded["tasks"], part_of, {"cluster": cluster})
        drawn = draw(loaded["tasks"], part_of, limit, side)
        texts = {}
        for name, task in loaded["tasks"].items():
            documents = task.eval_docs  # once: each asking reads them all anew
            texts[name] = [text_of(task, documents[item]) for item in _judged(name, task, drawn)]
    return texts
