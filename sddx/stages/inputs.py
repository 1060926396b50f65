"""What a run reads from disk, as artifacts: models, the files that settings name, the rows of evaluation tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from sddx.files.lines import lines
from sddx.records import REWRITES_FILE, Artifact
from sddx.store import Store
from sddx.store.digest import digest


def model_at(store: Store, name: str, path: str, revision: str | None = None) -> Artifact:
    """A model where it lies, with where its parts are found."""
    from sddx.models.families import TABLES, reading
    from sddx.models.load import decides, locate, text_config

    folder, _ = locate(path, revision=revision)
    model = store.source(name, folder, decides)
    hangs_on = ["reading", model.key, digest(TABLES), metadata.version("transformers")]
    return replace(model, reading=store.remembered(hangs_on, lambda: digest(reading(text_config(folder)))))


def read_by(store: Store, *nodes: Mapping[str, Any]) -> list[Artifact]:
    """What these settings read from disk, by content, the package's own evaluation tasks included; and the data of
    tasks that the hub has, by commit."""
    from sddx.evaluation.task_data import task_commits
    from sddx.evaluation.tasks import OWN_TASKS

    paths = [Path(node[key]) for node in nodes for key in ("path", "include", "data_files") if node.get(key)]
    evaluated = [node for node in nodes if "tasks" in node]
    asked = [(node["tasks"], node.get("include"), node.get("data_dir")) for node in evaluated]
    commits = [pinned for each in asked if (pinned := task_commits(*each))]
    files = [store.source("files", path) for path in ([OWN_TASKS] if asked else []) + paths]
    files += [_task_rows(store, node) for node in evaluated if node.get("data_dir")]
    return files + [Artifact("files", digest(pinned), OWN_TASKS) for pinned in commits]


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
