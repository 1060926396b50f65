"""lm-eval in process: the same harness for the unpruned, the pruned and the recovered model.

Importing this module is cheap; lm-eval and torch are imported by `evaluate`. Behaviour that is relied on was
read in lm-eval 0.4.13.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sddx.evaluation.statistics import standard_error
from sddx.records import UserError
from sddx.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

OWN_TASKS = Path(__file__).parents[1] / "tiny" / "tasks"
# What lm-eval's regex filters give for an answer in which they find nothing.
NOT_PARSED = "[invalid]"
# The same seeds as lm-eval's command line, so that its numbers can be compared with ours.
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}


def json_lines(*, data_files: Mapping[str, str], config_source: str, **metadata: Any) -> dict[str, Any]:
    """The data of a task whose JSONL files lie beside its YAML, as an lm-eval `custom_dataset`:

        custom_dataset: !function sddx.evaluation.harness.json_lines
        dataset_kwargs: {data_files: {test: arithmetic.jsonl}}

    Paths are relative to the YAML (lm-eval hands over its path as `config_source`, with the rest of the
    YAML's metadata), not to the working directory, and nothing is written to the cache of `datasets`.
    Returns one Dataset per split.
    """
    import datasets

    folder = Path(config_source).parent
    splits = {}
    for split, name in data_files.items():
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        splits[split] = datasets.Dataset.from_list([json.loads(line) for line in lines if line.strip()])
    return splits


def task_folders(include: str | None) -> list[Path]:
    """Folders that are searched for task YAMLs: the package's own, then the user's, which wins.

    Raises UserError where the user's is not a folder.
    """
    if include is not None and not Path(include).expanduser().is_dir():
        raise UserError(f"evaluation.include must be a folder of lm-eval task YAMLs, and {include} is none.")
    folders = [OWN_TASKS] if OWN_TASKS.is_dir() else []
    return folders + ([Path(include).expanduser().resolve()] if include is not None else [])


def check_tasks(tasks: Sequence[str], include: str | None = None) -> None:
    """Raise UserError, with near names, where a task is in none of the folders nor among lm-eval's own.

    Costs milliseconds as long as every task is in a folder; otherwise lm-eval's index is read (5 s).
    """
    if not tasks:
        raise UserError("evaluation.tasks is empty: name at least one task.")
    doubled = sorted({task for task in tasks if list(tasks).count(task) > 1})
    if doubled:
        raise UserError(f"evaluation.tasks names {', '.join(doubled)} more than once.")
    if not set(tasks) <= named_in_files(task_folders(include)):
        _task_manager(tasks, include)


def named_in_files(folders: Sequence[Path]) -> set[str]:
    """Names that YAML files declare literally (an inherited name is left to lm-eval's own index)."""
    declaration = re.compile(r"^(?:task|group):[ \t]*['\"]?([\w.:-]+)", re.MULTILINE)
    files = [file for folder in folders for file in folder.glob("**/*.yaml")]
    return {name for file in files for name in declaration.findall(file.read_text(encoding="utf-8"))}


def _task_manager(tasks: Sequence[str], include: str | None) -> Any:
    """lm-eval's TaskManager that knows all these tasks; its built-in index is read only where needed."""
    folders = task_folders(include)
    manager = _indexed(tuple(folders), defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = _indexed(tuple(folders), defaults=True)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(" ".join(_unknown(task, manager.all_tasks) for task in unknown) + _where(folders))
    return manager


@lru_cache(maxsize=4)  # lm-eval's own index takes seconds to read, and a sweep checks every cell
def _indexed(folders: tuple[Path, ...], *, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=defaults)


def _unknown(task: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(task, known, n=4, cutoff=0.6)
    return f"There is no evaluation task {task!r}" + (f"; near names: {', '.join(near)}." if near else ".")


def _where(folders: Sequence[Path]) -> str:
    searched = ", ".join(map(str, folders)) or "no folder"
    return f" Searched lm-eval's own tasks and {searched} (evaluation.include)."


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
    *,
    tasks: Sequence[str],
    include: str | None = None,
    batch_size: int = 32,
    chat_template: bool = True,
    shots: int | Mapping[str, int] | None = None,
    primary: Mapping[str, str] | None = None,
    max_new_tokens: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Run lm-eval on the model where it lies (its device), and keep what every item scored.

    `tasks` are lm-eval's names, groups included; `shots` overrides a task's number of examples (by task, or
    for all that do not fix 0 themselves, which is lm-eval's rule); `primary` overrides the reported metric
    ("acc_norm,none") by task; `limit` takes that many items of each task, drawn with a fixed seed.

    Returns {"tasks": {task: record}, "groups": lm-eval's own group figures, "batch_size", "truncated"}. A
    record holds `score` (mean of the primary metric), `stderr`, `chance`, `n`, `metrics`, `unparsed` (share
    of answers in which a filter found nothing, by filter), `part_of` (the name in `tasks`), `settings` (all
    that makes two evaluations comparable) and `samples`, one dict per item. `truncated` counts lm-eval's
    warnings that a prompt did not fit the model.

    Raises UserError for an unknown task, data that is not there, a tokenizer without a chat template, or an
    answer that is longer than the model's context.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, and evaluation.chat_template "
            "is on. Add a template to the tokenizer, or set evaluation.chat_template=false."
        )
    with _calm(runtime.quiet) as warnings, _seeded():
        loaded, part_of = _load(tasks, include)
        _configure(loaded["tasks"], part_of, shots, max_new_tokens)
        # The batch size must be given here: lm-eval ignores any other for a model that is handed over.
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        _fits(loaded["tasks"], harness.max_length)
        # `evaluate`, not `simple_evaluate`, which runs pip and git for a report of the environment each time.
        raw = evaluator.evaluate(
            harness,
            loaded,
            samples=_drawn(loaded["tasks"], limit),
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    if raw is None:
        raise RuntimeError("lm-eval gives results on the first process only")
    if warnings:
        logger.warning("%d prompts or batches did not fit the model's context: %s", len(warnings), warnings[0])
    template = _digest(str(tokenizer.chat_template)) if chat_template else None
    return {
        "tasks": {
            name: _record(task, raw, part_of[name], (primary or {}).get(part_of[name]), template, limit)
            for name, task in loaded["tasks"].items()
        },
        "groups": {name: _numbers(metrics) for name, metrics in raw.get("groups", {}).items()},
        "batch_size": batch_size,
        "truncated": len(warnings),
    }


class _Truncations(logging.Handler):
    """Keeps lm-eval's warnings that a prompt was cut, and drops all other messages."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "runcat" in record.getMessage():
            self.messages.append(record.getMessage())


@contextlib.contextmanager
def _calm(quiet: bool) -> Iterator[list[str]]:
    """Hold back lm-eval's chatter; yields the list that its warnings about truncated prompts are added to.

    Its bars for building contexts carry no name and last no time, so only those for requests are shown.
    """
    import lm_eval.api.task

    handler = _Truncations()
    parent = logging.getLogger("lm_eval")
    level, propagate, handlers = parent.level, parent.propagate, parent.handlers
    bar = lm_eval.api.task.tqdm
    parent.setLevel(logging.WARNING)
    parent.propagate, parent.handlers = False, [handler]
    lm_eval.api.task.tqdm = lambda items, total: items  # type: ignore[assignment]
    try:
        with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
            yield handler.messages
    finally:
        lm_eval.api.task.tqdm = bar
        parent.setLevel(level)
        parent.propagate, parent.handlers = propagate, handlers


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """lm-eval's seeds (some tasks shuffle choices on loading), and afterwards the random state as before."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _load(tasks: Sequence[str], include: str | None) -> tuple[Any, dict[str, str]]:
    """lm-eval's loaded tasks and groups, and for each task the asked-for name that it belongs to."""
    manager = _task_manager(tasks, include)
    loaded: dict[str, dict] = {"tasks": {}, "groups": {}, "group_map": {}}
    part_of: dict[str, str] = {}
    for name in tasks:
        try:
            found = manager.load([name])
        except Exception as error:
            # All that happens here is reading a task's YAML and data: files, the hub, the user's functions.
            raise UserError(
                f"The evaluation task {name!r} could not be loaded: {type(error).__name__}: {error}. Data on "
                "the Hugging Face hub must have been downloaded once, or be reachable now."
            ) from error
        for part in found["tasks"]:
            if part in part_of:
                raise UserError(f"The task {part!r} is asked for twice, in {part_of[part]!r} and {name!r}.")
            part_of[part] = name
        for kind in loaded:
            loaded[kind].update(found.get(kind, {}))
    return loaded, part_of


def _configure(
    tasks: Mapping[str, Any],
    part_of: Mapping[str, str],
    shots: int | Mapping[str, int] | None,
    max_new_tokens: int | None,
) -> None:
    for name, task in tasks.items():
        wanted = shots.get(part_of[name]) if isinstance(shots, Mapping) else shots
        default = task.get_config("num_fewshot")
        task.set_config("num_fewshot", (default or 0) if wanted is None or default == 0 else wanted)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
        if max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)


def _fits(tasks: Mapping[str, Any], context: int) -> None:
    """lm-eval cuts prompts to the room beside the answer, and stops with an assertion where there is none."""
    from lm_eval.models.utils import normalize_gen_kwargs

    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            answer = normalize_gen_kwargs(task.get_config("generation_kwargs"))["max_gen_toks"]
            if answer >= context:
                raise UserError(
                    f"The task {name!r} asks for up to {answer} new tokens, and the model's context "
                    f"has {context}. Set evaluation.max_new_tokens, or max_gen_toks in the task's YAML."
                )


def _drawn(tasks: Mapping[str, Any], limit: int | None) -> dict[str, list[int]] | None:
    """Items by task, ascending as lm-eval needs them. Not the first ones: files are often sorted."""
    if limit is None:
        return None
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    return {name: sorted(random.Random(0).sample(range(size), min(limit, size))) for name, size in sizes.items()}


def _primary(task: Any, samples: Sequence[Mapping[str, Any]], wanted: str | None) -> str:
    """The reported "metric,filter": as asked for, as the YAML's metadata says, or the first of each."""
    metadata = task.get_config("metadata") or {}
    known = list(dict.fromkeys(f"{metric},{row['filter']}" for row in samples for metric in row["metrics"]))
    first = f"{samples[0]['metrics'][0]},{samples[0]['filter']}"
    primary = wanted or metadata.get("primary") or first
    if primary not in known:
        name = task.get_config("task")
        raise UserError(f"The task {name!r} has no metric {primary!r}; it has {', '.join(known)}.")
    return primary


def _record(
    task: Any, raw: Any, part_of: str, wanted: str | None, template: str | None, limit: int | None
) -> dict[str, Any]:
    name = task.get_config("task")
    primary = _primary(task, raw["samples"][name], wanted)
    samples = _samples(raw["samples"][name], primary)
    scores = [sample["score"] for sample in samples]
    metrics = _numbers(raw["results"][name])
    score = sum(scores) / len(scores)
    if abs(score - metrics[primary]) > 1e-6:
        raise UserError(
            f"The metric {primary!r} of {name!r} is not a mean over items (lm-eval says {metrics[primary]}, "
            f"the mean is {score}). Choose one that is with evaluation.primary."
        )
    return {
        "score": score,
        "stderr": standard_error(scores),
        "chance": (task.get_config("metadata") or {}).get("chance"),
        "n": len(samples),
        "metrics": metrics,
        "unparsed": _unparsed(task, samples),
        "part_of": part_of,
        "settings": _settings(task, raw["versions"][name], primary, template, limit),
        "samples": samples,
    }


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if "," in name and "_stderr" not in name and isinstance(value, (int, float))
    }


def _samples(rows: Sequence[Mapping[str, Any]], primary: str) -> list[dict[str, Any]]:
    """One dict per item from lm-eval's one per item and filter."""
    items: dict[int, dict[str, Any]] = {}
    for row in rows:
        item = items.setdefault(row["doc_id"], _item(row))
        item["metrics"] |= {f"{metric},{row['filter']}": row[metric] for metric in row["metrics"]}
        if item["response"] is not None:
            item["answers"][row["filter"]] = row["filtered_resps"][0]
    for item in items.values():
        metrics = item["metrics"]
        item["score"] = _as_number(metrics[primary], primary)
        item["metrics"] = {name: float(v) for name, v in metrics.items() if not isinstance(v, (tuple, list))}
    return [items[index] for index in sorted(items)]


def _item(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same under every filter. First responses only: `repeats` above 1 is left to the filters."""
    first = [responses[0] for responses in row["resps"]]
    generated = isinstance(first[0], str)
    return {
        "doc_id": row["doc_id"],
        "doc_hash": row["doc_hash"],
        "prompt_hash": row["prompt_hash"],
        "target_hash": row["target_hash"],
        "metrics": {},
        "response": first[0] if generated else None,
        "answers": {},
        "likelihoods": None if generated else [r[0] if isinstance(r, tuple) else r for r in first],
    }


def _as_number(value: Any, metric: str) -> float:
    if isinstance(value, (tuple, list)):
        raise UserError(
            f"The metric {metric!r} gives no score per item, which recovery and its interval need. "
            "Name another one in the task's metadata (primary) or in evaluation.primary."
        )
    return float(value)


def _unparsed(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of answers in which a filter that extracts by regular expression found nothing, by filter."""
    filters = task.get_config("filter_list") or []
    extracting = [f["name"] for f in filters if any("regex" in step["function"] for step in f["filter"])]
    return {
        name: sum(sample["answers"].get(name) == NOT_PARSED for sample in samples) / len(samples)
        for name in extracting
    }


def _settings(task: Any, version: Any, primary: str, template: str | None, limit: int | None) -> dict[str, Any]:
    """What two evaluations must share to be compared; `chat_template` is a digest of it, or None."""
    import lm_eval

    return {
        "version": version,
        "primary": primary,
        "shots": task.get_config("num_fewshot"),
        "chat_template": template,
        "filters": json.loads(json.dumps(task.get_config("filter_list"), default=_name)),
        "generation": json.loads(json.dumps(task.get_config("generation_kwargs"), default=_name)),
        "seeds": SEEDS,
        "limit": limit,
        "lm_eval": lm_eval.__version__,
    }


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", str(function))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compact(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What recovery and comparisons need of `evaluate`'s results, by task: `scores` and `hashes` per item (a
    digest of document, prompt and target), `settings`, `chance` and `part_of`. Plain JSON."""
    return {
        name: {
            "scores": [sample["score"] for sample in record["samples"]],
            "hashes": [
                _digest(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"])
                for sample in record["samples"]
            ],
            "settings": record["settings"],
            "chance": record["chance"],
            "part_of": record["part_of"],
        }
        for name, record in results["tasks"].items()
    }


def responses(results: Mapping[str, Any]) -> list[str]:
    """All generated answers, for measures of the text itself."""
    records = results["tasks"].values()
    return [s["response"] for record in records for s in record["samples"] if s["response"] is not None]


def task_texts(tasks: Sequence[str], include: str | None, limit: Any) -> dict[str, list[str]]:
    """The text of every item that an evaluation of these tasks looks at, by task: its prompt and its target, or
    all its choices, without few-shot examples. Raises UserError as `evaluate` does."""
    with _calm(True), _seeded():
        loaded = _load(tasks, include)[0]["tasks"]
        drawn, texts = _drawn(loaded, limit), {}
        for name, task in loaded.items():
            documents = task.eval_docs
            items = drawn[name] if drawn else range(len(documents))
            texts[name] = [_text(task, documents[item]) for item in items]
    return texts


def _text(task: Any, document: Any) -> str:
    """A document's question and what may be answered. A task that is written as code may have no choices."""
    answers = task.doc_to_choice(document) if task.get_config("doc_to_choice") else [task.doc_to_target(document)]
    return "\n".join(map(str, [task.doc_to_text(document), *answers]))
