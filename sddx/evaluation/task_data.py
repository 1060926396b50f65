"""What evaluation tasks say before they are loaded: the hub datasets that they read, whether these can be read
here, and which tasks begin with a description."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sddx.evaluation.tasks import named_in_files, task_folders, task_manager
from sddx.hub import current_commit, unpacked
from sddx.records import UserError

PATIENCE = 3.0  # seconds that the hub has to answer


def task_datasets(tasks: Sequence[str], include: str | None = None) -> list[tuple[str, str | None]]:
    """What tasks and groups read from the Hugging Face hub, as (path, name) of `datasets.load_dataset`: each once,
    in their order, from lm-eval's index and without loading any.

    Data in local files, and what a task's own code loads, is not among them. Costs milliseconds where all tasks
    are the package's own, whose data lies beside them. Raises UserError as `check_tasks` does.
    """
    found = [_on_hub(settings) for parts in _parts(tasks, include).values() for settings in parts]
    return list(dict.fromkeys(pair for pair in found if pair is not None))


def described(tasks: Sequence[str], include: str | None = None) -> list[str]:
    """Those of the tasks that, or some part of which, begin with a description: lm-eval puts it into a system turn
    where there is a chat template. Costs and raises as `task_datasets` does; the package's own tasks have none."""
    parts = _parts(tasks, include)
    return [task for task in parts if any(settings.get("description") for settings in parts[task])]


def _parts(tasks: Sequence[str], include: str | None) -> dict[str, list[dict[str, Any]]]:
    """The settings of all tasks behind each name; none where all are the package's own."""
    if include is None and set(tasks) <= named_in_files(task_folders(None)):
        return {}
    index = task_manager(tasks, include).task_index
    return {task: list(_sources(index, task, {})) for task in tasks}


def _sources(index: Mapping[str, Any], member: Any, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of all tasks behind a name, or behind an entry in a group's list: a name with settings of
    its own, which win over those of the groups around it, which win over the task's."""
    own = {} if isinstance(member, str) else member
    name = member if isinstance(member, str) else own.get("group", own.get("task"))
    entry = index.get(name) if isinstance(name, str) else None
    config = own if entry is None else entry.cfg or {}
    settings = {**_told(config), **settings, **_told(own)}
    # A tag has no configuration, but names of its own; a group has a list of tasks.
    members = sorted(entry.tags) if entry is not None and entry.cfg is None else config.get("task")
    if not isinstance(members, list):
        yield settings
        return
    for each in members:
        yield from _sources(index, each, settings)


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "description")
    return {name: config[name] for name in names if name in config}


def _on_hub(source: Mapping[str, Any]) -> tuple[str, str | None] | None:
    path, given = source.get("dataset_path"), source.get("dataset_kwargs") or {}
    if path is None or source.get("custom_dataset") or Path(path).exists():
        return None
    # `json`, `parquet` and their like are no datasets, but ways to read the files that are given.
    reader = "/" not in path and ("data_files" in given or "data_dir" in given)
    return None if reader else (path, source.get("dataset_name"))


def require_task_data(tasks: Sequence[str], include: str | None = None) -> None:
    """Raise UserError where tasks read hub datasets that are not in the cache of `datasets`, and the hub cannot be
    reached; nothing is loaded. The hub is asked once, and only where something is missing."""
    missing = [pair for pair in task_datasets(tasks, include) if not unpacked(*pair)]
    if missing and not _hub_answers():
        from datasets.config import HF_DATASETS_CACHE

        raise UserError(
            f"The hub cannot be reached, and evaluation tasks need data that is not here: {_named(missing)}. "
            "Where there is a network, run python -m sddx.fetch with the settings of this run; it fills the cache "
            f"({HF_DATASETS_CACHE}), which can be copied here. The tasks of evaluation=tiny need no network."
        )


def task_commits(tasks: Sequence[str], include: str | None = None) -> dict[str, str]:
    """At which commit the hub datasets of tasks will be read, by path and subset. lm-eval asks for none, and
    `datasets` then takes the hub's main branch or, where the hub cannot be reached, the newest rows in its cache.
    Raises UserError as `check_tasks` does, and where neither is there."""
    return {f"{path}/{name or ''}": _commit(path, name) for path, name in task_datasets(tasks, include)}


def _commit(path: str, name: str | None) -> str:
    here = unpacked(path, name)
    return here[-1].name if here and not _hub_answers() else current_commit(path, None)


def _named(datasets: Sequence[tuple[str, str | None]]) -> str:
    """Each dataset with its subsets, the first few by name."""
    subsets: dict[str, list[str]] = {}
    for path, name in datasets:
        subsets.setdefault(path, []).extend([name] if name else [])
    return "; ".join(f"{path} ({_few(names)})" if names else path for path, names in subsets.items())


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@cache
def _hub_answers() -> bool:
    """Whether the hub may be asked, and answers at all (with whatever status)."""
    import httpx
    from datasets.config import HF_HUB_OFFLINE
    from huggingface_hub import constants, get_session

    if HF_HUB_OFFLINE or constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except httpx.HTTPError:
        return False
    return True
