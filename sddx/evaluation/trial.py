"""Whether loaded evaluation tasks can be run: found out on their documents, and with a model that says always the
same. Behaviour that is relied on was read in lm-eval 0.4.13."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval import evaluator
from lm_eval.api.model import LM

from sddx.errors import UserError
from sddx.evaluation.items import cluster_of
from sddx.evaluation.seeds import SEEDS
from sddx.evaluation.task_data import declared_mistakes, place, require_task_data
from sddx.evaluation.task_files import Rows, examples_split
from sddx.evaluation.tasks import claim, configure, is_mean, judged, load, of_task, said, shown, wrong_primary


class Mute(LM):
    """A model that answers every request at once, and like every other."""

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The same likelihood for every request, and that none is what the model would say."""
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The same likelihood for every text."""
        return [-1.0] * len(requests)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The same answer to every prompt."""
        return ["1"] * len(requests)


def tried(
    tasks: Sequence[str],
    include: str | None,
    setting: str,
    by_task: Mapping[str, Any],
    data_dir: str | None = None,
) -> list[str]:
    """What is wrong with tasks that exist and with what is given for them (`shots`, `primary`, `split`, ...): found
    on all documents where these are in files, on the first where they are in the cache of the hub's, and in their
    YAML alone where they are not here."""
    wrong, part_of = list[str](), dict[str, str]()
    try:
        require_task_data(tasks, include, data_dir)
    except UserError as error:
        wrong += error.args
        if data_dir is not None:
            return wrong  # each task would say it once more
    for name in tasks:
        try:
            location = place(name, include, data_dir)
            if location is None:
                wrong += declared_mistakes(name, include, of_task(by_task["primary"] or {}, name), setting)
                continue
            loaded, parts = load([name], include, by_task["split"], setting, data_dir)
            claim(part_of, name, parts)
            overrides = {key: by_task.get(key) for key in ("primary", "cluster")}
            configure(loaded["tasks"], parts, shots=by_task["shots"], max_new_tokens=None, metadata=overrides)
            wrong += mistakes(loaded["tasks"], setting, every=location == "files")
        except UserError as error:
            wrong += error.args
    return wrong + list(_idle(part_of, setting, by_task))


def _idle(part_of: Mapping[str, str], setting: str, by_task: Mapping[str, Any]) -> Iterator[str]:
    """Entries that say nothing, because they name a part of what was asked for."""
    for key, names in by_task.items():
        for part in names if isinstance(names, (Mapping, list, tuple)) else ():
            if part_of.get(part, part) != part:
                yield f"{setting}.{key} names {part!r}, a part of {part_of[part]!r}. Give it for {part_of[part]!r}."


def mistakes(tasks: Mapping[str, Any], setting: str = "evaluation", *, every: bool) -> Iterator[str]:
    """What would end an evaluation of these tasks, or make its scores none, for which the settings under `setting`
    were made (`tasks.configure`): documents that give no prompt, no answer or an answer that is none of the
    choices; more examples than there are; a primary metric that is not there, or is no mean over items.

    With `every`, all documents that are evaluated or shown as examples are looked at, else the first of them. The
    tasks are as they were afterwards, their seeds included.
    """
    for name, task in tasks.items():
        wrong = [
            *_of_documents(task, every=every),
            *_of_examples(name, task, setting),
            *_of_clusters(task, setting),
        ]
        wrong = wrong or list(_of_scores(name, task, setting))
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
        yield from (f"The task {name!r} {mistake}" for mistake in wrong)


def _of_documents(task: Any, *, every: bool) -> Iterator[str]:
    """The first document of each kind that is not fit, and how many others are not."""
    shots, examples = task.get_config("num_fewshot") or 0, getattr(getattr(task, "sampler", None), "df", [])
    kinds = [(f"split {judged(task)!r}", task.eval_docs, task.config, True)]
    kinds += [("examples", examples, task.fewshot_cfg, False)] if shots and examples else []
    for kind, documents, templates, is_judged in kinds if hasattr(task, "fewshot_cfg") else ():
        unfit = [
            (number, why)
            for number, document in enumerate(documents if every else [documents[0]], 1)
            if (why := _unfit(task, document, templates, is_judged))
        ]
        if unfit:
            more = f", and so with {len(unfit) - 1} more" if len(unfit) > 1 else ""
            yield f"cannot use document {unfit[0][0]} of its {kind}: {unfit[0][1]}{more}."


def _unfit(task: Any, document: Any, templates: Any, is_judged: bool) -> str | None:
    """Why a document gives no prompt or no answer, in the words of `templates`, the task's or its examples';
    None where it gives both."""
    try:
        text = task.doc_to_text(document, templates.doc_to_text)
        choices = task.doc_to_choice(document, templates.doc_to_choice) if templates.doc_to_choice else None
        target = task.doc_to_target(document, templates.doc_to_target)
    except Exception as error:  # whatever the author's templates and functions raise
        return shown(error)
    if choices is not None and not (_texts(choices) and choices and all(choices)):
        return f"its choices are {choices!r}, and must be a list of texts, none of them empty"
    if not isinstance(text, int if task.multiple_input else str):
        return (
            f"its prompt is {text!r}, and must be {'the number of a choice' if task.multiple_input else 'a text'}"
        )
    if callable(task.get_config("process_results")) and is_judged:
        return None  # which reads the document in its own way
    if isinstance(target, list) != bool(task.multiple_target) and target != []:
        other = "a list of answers" if task.multiple_target else "one answer"
        return f"its answer is {target!r}, where the first document has {other}"
    answer = text if task.multiple_input else target
    answers = answer if isinstance(answer, list) else [answer]
    right = _right(task, choices, is_judged)
    if all(right(each) for each in answers):
        return None
    among = f", which is none of its {len(choices)} choices (counted from 0)" if choices else ""
    return f"its answer is {answer!r}{among}"


def _right(task: Any, choices: Sequence[str] | None, is_judged: bool) -> Callable[[Any], bool]:
    """Whether lm-eval can show an answer, or count it as right: a choice by its number or its text; else a text, to
    which it turns numbers where the model writes."""
    if not is_judged:
        return lambda answer: isinstance(answer, str) or answer in range(len(choices or ()))
    if choices is not None:
        return lambda answer: answer in (choices if isinstance(answer, str) else range(len(choices)))
    kinds = (str, int, float) if task.OUTPUT_TYPE == "generate_until" else (str,)
    return lambda answer: isinstance(answer, kinds)


def _texts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)


def _of_clusters(task: Any, setting: str) -> Iterator[str]:
    """Whether the documents have the column, or those of the template, by which some belong together."""
    column, document = said(task).get("cluster"), task.eval_docs[0]
    if column is not None and column not in document and "{{" not in column:
        yield f"has no column {column!r} to tell its clusters by ({setting}.cluster); it has {', '.join(document)}."
        return
    try:
        cluster_of(task, document)
    except Exception as error:  # whatever a template raises
        yield f"cannot tell its clusters by {column!r} ({setting}.cluster): {shown(error)}."


def _of_examples(name: str, task: Any, setting: str) -> Iterator[str]:
    """Whether there are as many documents as are to be shown. An item is no example for itself where lm-eval takes
    its examples from the split that is evaluated."""
    shots = task.get_config("num_fewshot") or 0
    if not shots or not hasattr(task, "sampler"):
        return
    own = task.fewshot_cfg.split == task.get_config("test_split")
    room, source = len(task.sampler.df) - own, task.get_config("custom_dataset")
    if isinstance(source, Rows) and not task.sampler.df:
        split = examples_split(task)
        yield (
            f"is to show {shots} examples before each item, and {source.folder} has no file of them: "
            f"{name}.{split}.jsonl. Put it there, or set {setting}.shots=0, which needs none."
        )
        return
    if shots > room:
        besides = " besides the item itself" if own else ""
        yield (
            f"is to show {shots} examples before each item, and has {max(room, 0)} documents to take them "
            f"from{besides}. Set {setting}.shots, or num_fewshot in its YAML, to no more."
        )


def _of_scores(name: str, task: Any, setting: str) -> Iterator[str]:
    """Whether the first document goes all the way to a score, and that is one whose mean over items is reported."""
    if getattr(task, "UNSAFE_CODE", False):
        yield "runs code that a model has written (unsafe_code), which is not done here. Leave it out."
        return
    try:
        raw = evaluator.evaluate(
            Mute(), {"tasks": {name: task}}, samples={name: [0]}, bootstrap_iters=0, log_samples=True
        )
    except Exception as error:  # whatever the author's templates, filters and functions raise
        yield f"cannot be evaluated: {shown(error)}, on its first document."
        return
    rows = raw["samples"][name] if raw else []
    scores = {f"{metric},{row['filter']}": row[metric] for row in rows for metric in row["metrics"]}
    by = task.aggregation()
    numbers = [key for key, value in scores.items() if not isinstance(value, (tuple, list))]
    means = [key for key in numbers if is_mean(by.get(key.partition(",")[0]))]
    primary = said(task).get("primary") or next(iter(scores))
    yield from wrong_primary(primary, list(scores), means, setting)
