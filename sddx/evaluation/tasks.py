"""Evaluation tasks: their names, and how lm-eval is told to load, to configure and to sample them.

Importing this module is cheap; lm-eval is imported where it is needed. Behaviour that is relied on was read in
lm-eval 0.4.13.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sddx.records import UserError

OWN_TASKS = Path(__file__).parents[1] / "tiny" / "tasks"
# The same seeds as lm-eval's command line, so that its numbers can be compared with ours; and that of the items
# that a limit draws.
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234, "items": 0}


def task_folders(include: str | None) -> list[Path]:
    """Folders that are searched for task YAMLs: the package's own, then the user's, which wins.

    Raises UserError where the user's is not a folder.
    """
    if include is not None and not Path(include).expanduser().is_dir():
        raise UserError(f"include={include} is no folder. Give one that holds lm-eval task YAMLs, or null.")
    folders = [OWN_TASKS] if OWN_TASKS.is_dir() else []
    return folders + ([Path(include).expanduser().resolve()] if include is not None else [])


def check_tasks(
    tasks: Sequence[str],
    include: str | None = None,
    **by_task: Any,
) -> None:
    """Raise UserError, with near names, where a task is in none of the folders nor among lm-eval's own, and where
    one is named twice.

    Settings that are given by task (`limit`, `shots`, `primary`, `chance`) must name tasks that exist, too, but not
    only those of `tasks`: one file of settings serves any choice among its tasks. Costs milliseconds as long as
    every task is in a folder; otherwise lm-eval's index is read (5 s).
    """
    if unnamed := [task for task in tasks if not isinstance(task, str)]:
        raise UserError(f"tasks={list(tasks)}: {unnamed[0]} is no name of a task.")
    doubled = sorted({task for task in tasks if list(tasks).count(task) > 1})
    if doubled:
        raise UserError(f"tasks={list(tasks)} names {', '.join(doubled)} more than once.")
    settings = [setting for setting in by_task.values() if isinstance(setting, Mapping)]
    named = list(dict.fromkeys([*tasks, *(task for setting in settings for task in setting)]))
    if not set(named) <= named_in_files(task_folders(include)):
        task_manager(named, include)


def named_in_files(folders: Sequence[Path]) -> set[str]:
    """Names that YAML files declare literally (an inherited name is left to lm-eval's own index)."""
    declaration = re.compile(r"^(?:task|group):[ \t]*['\"]?([\w.:-]+)", re.MULTILINE)
    files = [file for folder in folders for file in folder.glob("**/*.yaml")]
    return {name for file in files for name in declaration.findall(file.read_text(encoding="utf-8"))}


def task_manager(tasks: Sequence[str], include: str | None) -> Any:
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
    return f" Searched lm-eval's own tasks and {searched} (include)."


def load(
    tasks: Sequence[str], include: str | None, split: Mapping[str, str] | None = None
) -> tuple[Any, dict[str, str]]:
    """lm-eval's loaded tasks and groups, and for each task the asked-for name that it belongs to. `split` names, by
    asked-for task, the split of its data that is judged instead of the task's own."""
    manager = task_manager(tasks, include)
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
            if name in (split or {}):
                _judge_on(found["tasks"][part], part, (split or {})[name])
        for kind in loaded:
            loaded[kind].update(found.get(kind, {}))
    return loaded, part_of


def judged(task: Any) -> str | None:
    """The split whose items are judged, by lm-eval's rule: the test split, else the validation split."""
    return task.get_config("test_split") or task.get_config("validation_split")


def _judge_on(task: Any, name: str, split: str) -> None:
    """Take a task's items from this split. Its examples are still drawn from where they were; where that is the
    same split, none of them is the item itself."""
    if split not in task.dataset:
        raise UserError(
            f"evaluation.split: the data of the task {name!r} has no split {split!r}; it has "
            f"{', '.join(task.dataset)}."
        )
    names = ("training_split", "validation_split", "test_split")
    drawn = [task.fewshot_cfg.split, *map(task.get_config, names)]
    task.set_config("test_split", split)
    if task.fewshot_cfg.samples is None and next(filter(None, drawn)) == split:
        task.fewshot_cfg.split = (
            split  # lm-eval leaves an item out of its examples where the two splits are named alike
        )


def given(by_task: Any, asked: str) -> Any:
    """The value of a setting for one asked-for task; one that is not given by task is the same for all."""
    return by_task.get(asked) if isinstance(by_task, Mapping) else by_task


def configure(
    tasks: Mapping[str, Any],
    part_of: Mapping[str, str],
    *,
    shots: int | Mapping[str, int] | None,
    max_new_tokens: int | None,
    metadata: Mapping[str, Mapping[str, Any]],
) -> None:
    """Set each task's number of examples, the seed that draws them, the length of its answers, and what
    `metadata` (by name and asked-for task) overrides in its YAML.

    A task that fixes 0 examples keeps them (lm-eval's rule: its prompt may hold its own), unless `shots` names
    this very task.
    """
    for name, task in tasks.items():
        asked = part_of[name]
        wanted, default = given(shots, asked), task.get_config("num_fewshot")
        fixed = default == 0 and not (isinstance(shots, Mapping) and name in shots)
        task.set_config("num_fewshot", (default or 0) if wanted is None or fixed else wanted)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
        told = {key: by_task[asked] for key, by_task in metadata.items() if asked in by_task}
        task.set_config("metadata", {**(task.get_config("metadata") or {}), **told})
        if max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)


def require_metrics(tasks: Mapping[str, Any]) -> None:
    """Raise UserError where a task's primary metric is none that it has, before it is run for hours."""
    for name, task in tasks.items():
        primary = (task.get_config("metadata") or {}).get("primary")
        known = [f"{metric},{by.name}" for by in task._filters for metric in task.aggregation()]
        if primary and primary not in known:
            raise UserError(f"The task {name!r} has no metric {primary!r}; it has {', '.join(known)}.")


def require_room(tasks: Mapping[str, Any], context: int) -> None:
    """Raise UserError where an answer may be as long as the model's whole context: lm-eval cuts prompts to the room
    beside the answer, and stops with an assertion where there is none."""
    from lm_eval.models.utils import normalize_gen_kwargs

    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            answer = normalize_gen_kwargs(task.get_config("generation_kwargs"))["max_gen_toks"]
            if answer >= context:
                raise UserError(
                    f"The task {name!r} asks for up to {answer} new tokens, and the model's context "
                    f"has {context}. Set evaluation.max_new_tokens, or max_gen_toks in the task's YAML."
                )


def draw(
    tasks: Mapping[str, Any], part_of: Mapping[str, str], limit: int | Mapping[str, int] | None
) -> dict[str, list[int]] | None:
    """Items by task, ascending as lm-eval needs them; None for all. A smaller limit draws a part of what a larger
    one does, and which items these are hangs on the task's name and size alone.

    A limit is that of an asked-for task, and is shared out among its parts.
    """
    if limit is None:
        return None
    drawn: dict[str, list[int]] = {}
    for asked in dict.fromkeys(part_of.values()):
        sizes = {name: len(task.eval_docs) for name, task in tasks.items() if part_of[name] == asked}
        wanted = given(limit, asked)
        shares = sizes if wanted is None else shared_out(wanted, sizes)
        drawn |= {name: _sample(name, sizes[name], share) for name, share in shares.items()}
    return drawn


def shared_out(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many items of each part: equal numbers, because parts count equally in their task's score. It is unbiased
    with any numbers, and surest with equal ones where parts vary alike. What a small part lacks, larger ones give;
    at least one of each."""
    shares: dict[str, int] = {}
    for size, name in sorted((size, name) for name, size in sizes.items()):
        still = (total - sum(shares.values())) // (len(sizes) - len(shares))
        shares[name] = min(size, max(1, still))
    return shares


def _sample(name: str, size: int, count: int) -> list[int]:
    """The first items in an order that a digest gives, not those of the file: files are often sorted."""
    return sorted(sorted(range(size), key=lambda item: _rank(name, item))[:count])


def _rank(name: str, item: int) -> bytes:
    return hashlib.sha256(f"{SEEDS['items']}/{name}/{item}".encode()).digest()
