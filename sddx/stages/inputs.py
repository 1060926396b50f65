"""What a run reads from disk, as artifacts: models, the files that settings name, the rows of evaluation tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from os.path import exists, expanduser, isfile
from pathlib import Path
from typing import Any

from sddx.files.lines import lines
from sddx.records import REWRITES_FILE, Artifact
from sddx.store import Store
from sddx.store.digest import digest

READ = ("path", "include", "data_files")  # settings that say what is read from disk


def model_at(store: Store, name: str, path: str, revision: str | None = None) -> Artifact:
    """A model where it lies, with where its parts are found."""
    from sddx.models.families import TABLES, reading
    from sddx.models.load import decides, locate, text_config

    folder, _ = locate(path, revision=revision)
    model = store.source(name, folder, decides)
    hangs_on = ["reading", model.key, digest(TABLES), metadata.version("transformers")]
    return replace(model, reading=store.remembered(hangs_on, lambda: digest(reading(text_config(folder)))))


def read_by(store: Store, *nodes: Mapping[str, Any]) -> list[Artifact]:
    """What these settings read from disk, by content, the package's own evaluation tasks where these are asked for
    included; and the data of tasks that the hub has, by commit."""
    from sddx.evaluation.task_data import task_commits
    from sddx.evaluation.tasks import OWN_TASKS

    evaluated = [node for node in nodes if "tasks" in node]
    asked = [(node["tasks"], node.get("include"), node.get("data_dir")) for node in evaluated]
    commits = [pinned for each in asked if (pinned := task_commits(*each))]
    paths = [OWN_TASKS] if any(_asks_ours(*each[:2]) for each in asked) else []
    paths += [path for node in nodes for path in _named(node)]
    paths += [path for each in asked for path in _data_beside(*each[:2])]
    files = [store.source("files", path) for path in paths]
    files += [_task_rows(store, node) for node in evaluated if node.get("data_dir")]
    return files + [Artifact("files", digest(pinned), OWN_TASKS) for pinned in commits]


def _named(node: Mapping[str, Any]) -> Iterator[Path]:
    """The files and folders that settings name; of what others wrote, every text in them that is a file."""
    yield from (Path(node[key]) for key in READ if node.get(key))
    if not str(node.get("_target_", "sddx.")).startswith("sddx."):
        others = _texts({key: value for key, value in node.items() if key not in READ})
        yield from (Path(text) for text in others if isfile(expanduser(text)))


def _texts(value: Any) -> Iterator[str]:
    """The texts in settings, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def _asks_ours(tasks: Sequence[str], include: str | None) -> bool:
    """Whether any of these tasks is the package's own; tasks of a user's folder may build on them."""
    from sddx.evaluation.tasks import OWN_TASKS, named_in_files

    return include is not None or not named_in_files([OWN_TASKS]).isdisjoint(tasks)


def _data_beside(tasks: Sequence[str], include: str | None) -> Iterator[Path]:
    """What the YAML files in a user's folder take rows from that lies elsewhere on this machine."""
    if include is None:
        return
    read = [[part.get("dataset_path"), part.get("dataset_kwargs")] for part in task_parts(tasks, include)]
    for text in dict.fromkeys(_texts(read)):
        if exists(expanduser(text)) and not Path(text).absolute().is_relative_to(Path(include).absolute()):
            yield Path(text)


def task_parts(tasks: Sequence[str], include: str | None) -> Iterator[Mapping[str, Any]]:
    """What their YAML files say of tasks and, of groups, of each part. Raises UserError where there is no such
    task."""
    from sddx.evaluation.tasks import task_manager

    index, left = task_manager(tasks, include).task_index, list[Any](tasks)
    while left:
        own = {} if isinstance(member := left.pop(), str) else member
        name = own.get("group", own.get("task")) if own else member
        entry = index.get(name) if isinstance(name, str) else None
        config = {**((entry.cfg or {}) if entry else {}), **own}
        parts = sorted(entry.tags) if entry and entry.cfg is None else config.get("task")
        if isinstance(parts, list):
            left += parts
        else:
            yield config


def task_files(store: Store, metrics: Mapping[str, Any]) -> list[Artifact]:
    """The files of evaluation tasks that metrics look at."""
    values = [metric.get("value") for metric in metrics.values()]
    return list(dict.fromkeys(read_by(store, *(v for v in values if isinstance(v, dict) and "tasks" in v))))


def count_rows(shard: Artifact) -> int:
    """The rows of a shard, references or rewrites; none of one that is still to be written."""
    path = shard.path / REWRITES_FILE if shard.stage == "select" else shard.path
    return len(lines(path)) if path.exists() else 0


def keyed_rows(store: Store, settings: Any) -> Any:
    """Settings in which a folder of tasks' rows is known by the key of what is read there, wherever it lies."""
    if not isinstance(settings, dict):
        return settings
    keyed = {name: keyed_rows(store, value) for name, value in settings.items()}
    placed = "tasks" in settings and settings.get("data_dir")
    return {**keyed, "data_dir": _task_rows(store, settings).key} if placed else keyed


def _task_rows(store: Store, node: Mapping[str, Any]) -> Artifact:
    """The folder that evaluation tasks take their rows from, by the content of the files that they read there."""
    from sddx.evaluation.task_data import task_files as files_of_tasks
    from sddx.evaluation.task_files import ROWS, folder_of

    files = files_of_tasks(node["tasks"], node.get("include"), node["data_dir"])
    keys = {task: {split: store.source(ROWS, path).key for split, path in of.items()} for task, of in files.items()}
    return Artifact(ROWS, digest(keys), folder_of(node["data_dir"]) or Path())
