"""Evaluation tasks: their names, and how lm-eval is told to load, to configure and to sample them.

Importing this module is cheap; lm-eval is imported where it is needed. Behaviour that is relied on was read in
lm-eval 0.4.13.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from types import NoneType
from typing import Any

from sddx.errors import UserError
from sddx.evaluation.seeds import SEEDS
from sddx.evaluation.task_files import examples_split, reading

OWN_TASKS = Path(__file__).parents[1] / "tiny" / "tasks"
NETWORK = ("datasets", "huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "fsspec", "aiohttp")


# What may stand in a setting that is given by task.
BY_TASK: dict[str, tuple[type, ...]] = {
    "limit": (int, NoneType),
    "shots": (int, NoneType),
    "chance": (int, float, NoneType),
    "primary": (str,),
    "split": (str,),
    "cluster": (str,),
}


def task_folders(include: str | None, setting: str = "evaluation") -> list[Path]:
    """Folders that are searched for task YAMLs: the package's own, then the user's, which wins.

    Raises UserError, which names the group of settings that `include` stands in, where the user's is not a folder.
    """
    if include is not None and not Path(include).expanduser().is_dir():
        raise UserError(
            f"{setting}.include={include} is no folder. Give one that holds lm-eval task YAMLs, or null."
        )
    folders = [OWN_TASKS] if OWN_TASKS.is_dir() else []
    return folders + ([Path(include).expanduser().resolve()] if include is not None else [])


def check_tasks(
    tasks: Sequence[str],
    include: str | None = None,
    *,
    setting: str = "evaluation",
    apart: Sequence[str] = (),
    **by_task: Any,
) -> None:
    """Raise UserError, with near names, where a task is in none of the folders nor among lm-eval's own, and where
    one is named twice; and for names and values that can be none, all at once. `setting` is the group of settings
    that these stand in, for the message.

    Those that stand `apart`, and settings that are given by task (`limit`, `shots`, `primary`, ...), must name
    tasks that exist, too, but not only those of `tasks`: one file of settings serves any choice among its tasks.
    Costs milliseconds as long as every task is in a folder, and a second where lm-eval's own are; for a task that
    is nowhere, lm-eval's index is read (5 s).
    """
    wrong = no_names(tasks, setting, **by_task) + not_texts(apart, f"{setting}.apart")
    maps = {f"{setting}.{key}": values for key, values in by_task.items() if isinstance(values, Mapping)}
    for where, names in {f"{setting}.tasks": tasks, f"{setting}.apart": apart, **maps}.items():
        wrong += missing(names, include, where, setting)
    if wrong:
        raise UserError(*dict.fromkeys(wrong))


def no_names(tasks: Sequence[Any], setting: str, **by_task: Any) -> list[str]:
    """What can be no task's name, or no value of a setting that is given by task; and which tasks come twice."""
    maps = {f"{setting}.{key}": values for key, values in by_task.items() if isinstance(values, Mapping)}
    wrong = [
        mistake
        for where, names in {f"{setting}.tasks": tasks, **maps}.items()
        for mistake in not_texts(names, where)
    ]
    wrong += [mistake for where, values in maps.items() for mistake in _no_values(where, values)]
    if doubled := sorted({name for name in tasks if isinstance(name, str) and list(tasks).count(name) > 1}):
        wrong.append(f"{setting}.tasks={list(tasks)} names {', '.join(doubled)} more than once.")
    return wrong


def not_texts(names: Iterable[Any], where: str) -> list[str]:
    """What stands at `where` in place of a task's name."""
    wrong = [name for name in names if not isinstance(name, str)]
    return [f"{where} names {name!r}, and a task's name is a text." for name in wrong]


def _no_values(where: str, values: Mapping[Any, Any]) -> Iterator[str]:
    kinds = BY_TASK[where.rpartition(".")[2]]
    for name, value in values.items():
        if not isinstance(value, kinds) or isinstance(value, bool):
            yield f"{where}.{name}={value!r} must be {'a text' if str in kinds else 'a number'}."


def missing(names: Iterable[Any], include: str | None, where: str, setting: str = "evaluation") -> list[str]:
    """Which of the texts among names, that stand at `where`, are no task, no group and no tag. Costs as
    `check_tasks` does."""
    try:
        unknown = {name for name in names if isinstance(name, str)} - named_in_files(task_folders(include, setting))
    except UserError as error:
        return list(error.args)
    try:
        if unknown and unknown - _built_in():
            task_manager(sorted(unknown), include, setting)
    except UserError as error:
        return [f"{where}: {mistake}" for mistake in error.args]
    return []


@cache
def _built_in() -> set[str]:
    """lm-eval's own tasks, by name: read in a second, where its index takes five."""
    import lm_eval

    return named_in_files([Path(lm_eval.__file__).parent / "tasks"])


def named_in_files(folders: Sequence[Path]) -> set[str]:
    """Names that YAML files declare literally (an inherited name is left to lm-eval's own index). Files that cannot
    be read are passed over, as lm-eval does."""
    declaration = re.compile(rb"^['\"]?(?:task|group|tag)['\"]?:[ \t]*['\"]?([\w.:-]+)", re.MULTILINE)
    files = [file for folder in folders for file in folder.glob("**/*.yaml")]
    return {name.decode() for file in files for name in declaration.findall(_bytes(file))}


def _bytes(file: Path) -> bytes:
    """What a file holds; nothing for a folder, a link to nowhere, and what may not be read."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def task_manager(tasks: Sequence[str], include: str | None, setting: str = "evaluation") -> Any:
    """lm-eval's TaskManager that knows all these tasks, and what their groups name; its built-in index is read only
    where needed. Raises UserError for those that it does not know."""
    folders = task_folders(include, setting)
    manager = _indexed(tuple(folders), defaults=False)
    if not _whole(manager.task_index, tasks):
        manager = _indexed(tuple(folders), defaults=True)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        searched = _where(folders, setting)
        raise UserError(*(_unknown(task, manager.all_tasks) + searched for task in unknown))
    return manager


def _whole(index: Mapping[str, Any], tasks: Sequence[str]) -> bool:
    """Whether these names are in the index, and all that groups among them name as well."""
    known, left = set[str](), [*tasks]
    while left and left[-1] in index:
        known.add(name := left.pop())
        members = (index[name].cfg or {}).get("task")
        named = [member for member in members if isinstance(member, str)] if isinstance(members, list) else []
        left += set(named) - known
    return not left


def _indexed(folders: tuple[Path, ...], *, defaults: bool) -> Any:
    files = sorted(file for folder in folders for file in folder.glob("**/*.yaml"))
    return _index_of(folders, defaults, tuple((file, file.lstat().st_mtime_ns) for file in files))


@lru_cache(maxsize=4)  # lm-eval's own index takes seconds to read, and a sweep checks every cell
def _index_of(folders: tuple[Path, ...], defaults: bool, files: tuple[tuple[Path, int], ...]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=defaults)


def in_folders(task: str, include: str | None) -> bool:
    """Whether a task is the package's own or the user's, and none that comes with lm-eval."""
    return task in _indexed(tuple(task_folders(include)), defaults=False).all_tasks


def _unknown(task: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(task, known, n=4, cutoff=0.6)
    return f"There is no evaluation task {task!r}" + (f"; near names: {', '.join(near)}." if near else ".")


def _where(folders: Sequence[Path], setting: str) -> str:
    """Where a task was searched, and the files there that lm-eval passes over, with the reason."""
    searched = ", ".join(map(str, folders)) or "no folder"
    passed = "; ".join(f"{file} ({why})" for folder in folders for file, why in _damaged(folder))
    message = f" Searched lm-eval's own tasks and {searched} ({setting}.include)."
    return message + (f" Could not be read there: {passed}." if passed else "")


def _damaged(folder: Path) -> Iterator[tuple[str, str]]:
    from lm_eval.tasks._yaml_loader import load_yaml

    for file in sorted(folder.glob("**/*.yaml")):
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # whatever is wrong with a file, lm-eval passes over it
            yield str(file.relative_to(folder)), shown(error)


def _root(error: BaseException) -> BaseException:
    """What an error was first raised from."""
    return error if error.__cause__ is None else _root(error.__cause__)


def shown(error: BaseException) -> str:
    """An error in one line: what was first raised and, where its words alone say little, the line of code."""
    error = _root(error)
    message = f"{type(error).__name__}: {' '.join(str(error).split()).removesuffix('.')}"
    if not isinstance(error, (LookupError, TypeError, AttributeError, AssertionError)) or not error.__traceback__:
        return message
    return f"{message}, in `{traceback.extract_tb(error.__traceback__)[-1].line}`"


def load(
    tasks: Sequence[str],
    include: str | None,
    split: Mapping[str, str] | None = None,
    setting: str = "evaluation",
    data_dir: str | None = None,
) -> tuple[Any, dict[str, str]]:
    """lm-eval's loaded tasks and groups, and for each task the asked-for name that it belongs to. `split` names, by
    asked-for task, the split of its data that is evaluated instead of the task's own; `data_dir` is a folder of
    rows that stand in for the hub's (task_files).

    Raises UserError for a task that cannot be loaded, and for one that is asked for twice.
    """
    manager = task_manager(tasks, include, setting)
    loaded: dict[str, dict] = {"tasks": {}, "groups": {}, "group_map": {}}
    part_of: dict[str, str] = {}
    for name in tasks:
        entries = _loaded(reading(manager, data_dir, (split or {}).get(name)), name)
        claim(part_of, name, entries["tasks"])
        for part, task in entries["tasks"].items() if name in (split or {}) else ():
            _judge_on(task, part, (split or {})[name], setting)
        for kind in loaded:
            loaded[kind].update(entries.get(kind, {}))
    return loaded, part_of


def _loaded(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except UserError as error:
        raise UserError(*(f"The evaluation task {name!r}: {mistake}" for mistake in error.args)) from error
    except Exception as error:
        # All that happens here is reading a task's YAML and data, and trying its first document: files, the hub,
        # templates and functions of the task's author.
        raise UserError(
            f"The evaluation task {name!r} could not be loaded: {shown(error)}.{_advice(manager, name, error)}"
        ) from error


def _advice(manager: Any, name: str, error: BaseException) -> str:
    """What may help against an error: other data from the hub, or the file that it comes from."""
    error = _root(error)
    if isinstance(error, ConnectionError) or type(error).__module__.split(".")[0] in NETWORK:
        return " Data on the Hugging Face hub must have been downloaded once, or be reachable now."
    path = manager.task_index[name].yaml_path
    return f" Its file is {path}." if path else ""


def claim(part_of: dict[str, str], name: str, parts: Iterable[str]) -> None:
    """Note that these parts belong to the asked-for `name`. Raises UserError where one belongs to another."""
    for part in parts:
        if part in part_of:
            raise UserError(f"The task {part!r} is asked for twice, in {part_of[part]!r} and {name!r}.")
        part_of[part] = name


def judged(task: Any) -> str | None:
    """The split whose items are evaluated, by lm-eval's rule: the test split, else the validation split."""
    return task.get_config("test_split") or task.get_config("validation_split")


def _judge_on(task: Any, name: str, split: str, setting: str) -> None:
    """Take a task's items from this split. Its examples are still drawn from where they were; where that is the
    same split, none of them is the item itself."""
    if not len(task.dataset.get(split, ())):
        there = ", ".join(each for each in task.dataset if len(task.dataset[each]))
        raise UserError(f"{setting}.split: the data of the task {name!r} has no split {split!r}; it has {there}.")
    drawn = examples_split(task)
    task.set_config("test_split", split)
    if task.fewshot_cfg.samples is None and drawn == split:
        task.fewshot_cfg.split = (
            split  # lm-eval leaves an item out of its examples where the two splits are named alike
        )


def text_of(task: Any, document: Any) -> str:
    """A document's question and what may be answered; where choices are several beginnings of one text, each with
    its end. A task that is written as code may have no choices."""
    if getattr(task, "multiple_input", 0):
        return "\n".join(f"{choice} {task.doc_to_target(document)}" for choice in task.doc_to_choice(document))
    answers = task.doc_to_choice(document) if task.get_config("doc_to_choice") else [task.doc_to_target(document)]
    return "\n".join(map(str, [task.doc_to_text(document), *answers]))


def of_task(by_task: Any, asked: str) -> Any:
    """The value of a setting for one asked-for task; one that is not given by task is the same for all."""
    return by_task.get(asked) if isinstance(by_task, Mapping) else by_task


def configure(
    tasks: Mapping[str, Any],
    part_of: Mapping[str, str],
    *,
    shots: int | Mapping[str, int] | None,
    max_new_tokens: int | None,
    metadata: Mapping[str, Mapping[str, Any] | None],
) -> None:
    """Set each task's number of examples, the seed that draws them, the length of its answers, and what
    `metadata` (by name and asked-for task) overrides in its YAML.

    A task that fixes 0 examples keeps them (lm-eval's rule: its prompt may hold its own), unless `shots` names
    this very task.
    """
    tell(tasks, part_of, metadata)
    for name, task in tasks.items():
        asked = part_of[name]
        wanted, default = of_task(shots, asked), task.get_config("num_fewshot")
        fixed = default == 0 and not (isinstance(shots, Mapping) and name in shots)
        task.set_config("num_fewshot", (default or 0) if wanted is None or fixed else wanted)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
        if max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)


def tell(
    tasks: Mapping[str, Any], part_of: Mapping[str, str], metadata: Mapping[str, Mapping[str, Any] | None]
) -> None:
    """Override what each task's YAML says of itself by `metadata` (by name and asked-for task)."""
    for name, task in tasks.items():
        asked = part_of[name]
        overrides = {key: by_task[asked] for key, by_task in metadata.items() if by_task and asked in by_task}
        task.set_config("metadata", {**said(task), **overrides})


def said(task: Any) -> dict[str, Any]:
    """What a task's YAML and the settings say of it."""
    return task.get_config("metadata") or {}


def wrong_primary(primary: str, metrics: Sequence[str], means: Sequence[str], setting: str) -> Iterator[str]:
    """What is wrong with a primary metric, of a task that has these, of which some are means over items."""
    if primary not in metrics:
        yield f"has no metric {primary!r}; it has {', '.join(metrics)} ({setting}.primary)."
    elif primary not in means:
        instead = (
            f"Set {setting}.primary to one that is: {', '.join(means)}." if means else "It has none: leave it out."
        )
        yield (
            f"is scored by {primary!r}, which is not a mean over items, and recovery and its interval need one. "
            + instead
        )


def is_mean(aggregation: Callable[[Sequence[float]], float] | None) -> bool:
    """Whether the scores of items are put together as their mean; so they are where a metric does not say how."""
    scores = [0.0, 1.0, 1.0, 0.25]
    try:
        return aggregation is None or abs(float(aggregation(scores)) - sum(scores) / len(scores)) < 1e-9
    except Exception:  # one that takes other things than numbers
        return False


def new_tokens(generation: Mapping[str, Any] | None) -> int:
    """How long an answer may be, by a task's `generation_kwargs`."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return normalize_gen_kwargs({**(generation or {})})["max_gen_toks"]


def require_room(answers: Mapping[str, int], context: int) -> None:
    """Raise UserError where an answer (by task, how long it may be) may be as long as the model's whole context:
    lm-eval cuts prompts to the room beside the answer, and stops with an assertion where there is none."""
    wrong = [
        f"The task {name!r} asks for up to {length} new tokens, and the model's context has {context}. Set "
        "evaluation.max_new_tokens, or max_gen_toks in the task's YAML."
        for name, length in answers.items()
        if length >= context
    ]
    if wrong:
        raise UserError(*wrong)
