"""What evaluation tasks say before they are loaded: the hub datasets that they read, whether these can be read
here, and which tasks begin with a description."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from sddx.errors import UserError
from sddx.evaluation.task_files import files_of, no_file, on_hub
from sddx.evaluation.tasks import (
    in_folders,
    is_mean,
    named_in_files,
    new_tokens,
    task_folders,
    task_manager,
    wrong_primary,
)
from sddx.hub import current_commit, unpacked

# The settings of a task that are read before it is loaded.
LOOKED_AT = (
    "class custom_dataset dataset_path dataset_name dataset_kwargs description output_type metric_list filter_list "
    "process_results generation_kwargs metadata"
).split()
PATIENCE = 3.0  # seconds that the hub has to answer


def task_datasets(
    tasks: Sequence[str], include: str | None = None, data_dir: str | None = None
) -> list[tuple[str, str | None]]:
    """What tasks and groups read from the Hugging Face hub, as (path, name) of `datasets.load_dataset`: each once,
    in their order, from lm-eval's index and without loading any.

    Data in local files, those of `data_dir` included (task_files), and what a task's own code loads, is not among
    them. Costs milliseconds where all tasks are the package's own, whose data lies beside them. Raises UserError as
    `check_tasks` does.
    """
    parts = [settings for parts in _parts(tasks, include).values() for settings in parts]
    pairs = [on_hub(settings) for settings in parts if not files_of(settings["task"], data_dir)]
    return list(dict.fromkeys(pair for pair in pairs if pair is not None))


def task_files(tasks: Sequence[str], include: str | None, data_dir: str | None) -> dict[str, dict[str, Path]]:
    """The files in `data_dir` that tasks take their rows from, by task (of a group: each part) and split. Raises
    UserError as `check_tasks` does."""
    if data_dir is None:
        return {}
    parts = [settings["task"] for parts in _parts(tasks, include, data_dir).values() for settings in parts]
    return {task: files for task in dict.fromkeys(parts) if (files := files_of(task, data_dir))}


def described(tasks: Sequence[str], include: str | None = None) -> list[str]:
    """Those of the tasks that, or some part of which, begin with a description: lm-eval puts it into a system turn
    where there is a chat template. Costs and raises as `task_datasets` does; the package's own tasks have none."""
    parts = _parts(tasks, include)
    return [task for task in parts if any(settings.get("description") for settings in parts[task])]


def _parts(
    tasks: Sequence[str], include: str | None, data_dir: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """The settings of all tasks behind each name, with the task's own; none where all are the package's own and
    none of their rows are in `data_dir`."""
    if include is data_dir is None and set(tasks) <= named_in_files(task_folders(None)):
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
    settings = {**_stated(config), **settings, **_stated(own)}
    # A tag has no configuration, but names of its own; a group has a list of tasks.
    members = sorted(entry.tags) if entry is not None and entry.cfg is None else config.get("task")
    if not isinstance(members, list):
        yield {**settings, "task": str(name)}
        return
    for each in members:
        yield from _sources(index, each, settings)


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in LOOKED_AT if name in config}


def place(task: str, include: str | None, data_dir: str | None = None) -> Literal["files", "hub"] | None:
    """Where the documents of a task or group are on this machine: in files, or in the cache of the hub's (of a
    single task). None where they are not here, or where lm-eval's own code fetches them. Raises UserError where its
    files name no data at all."""
    parts = _parts([task], include, data_dir).get(task, [])
    if parts and all(files_of(part["task"], data_dir) for part in parts):
        return "files"
    if any(not part.keys() & {"class", "custom_dataset", "dataset_path"} for part in parts):
        raise UserError(
            f"The evaluation task {task!r} names no data: set custom_dataset or dataset_path in its YAML."
        )
    hub = [pair for part in parts if (pair := on_hub(part)) and not files_of(part["task"], data_dir)]
    if not hub:
        remote = any("://" in str(part.get("dataset_kwargs")) for part in parts)
        return "files" if in_folders(task, include) and not remote else None
    return "hub" if len(parts) == 1 and unpacked(*hub[0]) else None


def declared_mistakes(task: str, include: str | None, primary: str | None, setting: str) -> list[str]:
    """What is wrong with the primary metric of a task, or of the parts of a group, as their YAML says: it is not
    there, or no mean over items. What is left to code there is left to the trial on documents."""
    mistakes: list[str] = []
    for part in _parts([task], include).get(task, []):
        metrics, asked = _metrics(part), primary or (part.get("metadata") or {}).get("primary")
        means = [name for name, mean in metrics.items() if mean]
        # Which metric is the first is lm-eval's choice, so that it may be one that is a mean; and the author's code
        # may give others than its YAML lists.
        assumed = asked or next(iter([*means, *metrics]), None)
        if assumed in metrics or (metrics and "process_results" not in part):
            mistakes += wrong_primary(str(assumed), list(metrics), means, setting)
    return list(dict.fromkeys(f"The task {task!r} {wrong}" for wrong in mistakes))


def written(tasks: Sequence[str], include: str | None, most: int | None) -> dict[str, int]:
    """How long the answers of tasks may be, in tokens, by those that ask for any: `most`, or what their YAML says.
    Raises UserError as `check_tasks` does."""
    index, longest = task_manager(tasks, include).task_index, {}
    for task in tasks:
        kwargs = [part.get("generation_kwargs") for part in _sources(index, task, {}) if _is_written(part)]
        if kwargs:
            longest[task] = most or max(map(new_tokens, kwargs))
    return longest


def _is_written(settings: Mapping[str, Any]) -> bool:
    return "class" not in settings and settings.get("output_type", "generate_until") == "generate_until"


def _metrics(settings: Mapping[str, Any]) -> dict[str, bool]:
    """By "metric,filter", whether it is a mean over items; nothing where code says what the metrics are."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, get_aggregation, get_metric_aggregation

    kind = settings.get("output_type") or "generate_until"
    listed = settings.get("metric_list") or [{"metric": name} for name in DEFAULT_METRIC_REGISTRY.get(kind, [])]
    named = [(metric.get("metric"), metric.get("aggregation")) for metric in listed]
    if "class" in settings or any(not name or "/" in f"{name}{aggregation}" for name, aggregation in named):
        return {}
    means = {
        name: is_mean(get_aggregation(aggregation) if aggregation else get_metric_aggregation(name))
        for name, aggregation in named
    }
    filters = [each["name"] for each in settings.get("filter_list") or [{"name": "none"}]]
    return {f"{metric},{by}": mean for by in filters for metric, mean in means.items()}


def require_task_data(tasks: Sequence[str], include: str | None = None, data_dir: str | None = None) -> None:
    """Raise UserError where tasks read hub datasets that are not in the cache of `datasets`, and the hub cannot be
    reached; nothing is loaded. The hub is asked once, and only where something is missing. With a `data_dir` it is
    not asked: all rows must be there."""
    if data_dir is not None:
        _require_files(tasks, include, data_dir)
        return
    missing = [pair for pair in task_datasets(tasks, include) if not unpacked(*pair)]
    if missing and not _hub_answers():
        from datasets.config import HF_DATASETS_CACHE

        raise UserError(
            f"The hub cannot be reached, and evaluation tasks need data that is not here: {_named(missing)}. "
            "Where there is a network, run sddx fetch with the settings of this run; it fills the cache "
            f"({HF_DATASETS_CACHE}), which can be copied here. Or name a folder of their rows: "
            "evaluation.data_dir. The tasks of evaluation=tiny need no network."
        )


def _require_files(tasks: Sequence[str], include: str | None, data_dir: str) -> None:
    """Raise UserError, once for each asked-for name, for rows that would come from the hub."""
    wrong = []
    for parts in _parts(tasks, include, data_dir).values():
        lacking = [part["task"] for part in parts if on_hub(part) and not files_of(part["task"], data_dir)]
        wrong += [no_file(lacking, data_dir)] if lacking else []
    if wrong:
        raise UserError(*wrong)


def task_commits(tasks: Sequence[str], include: str | None = None, data_dir: str | None = None) -> dict[str, str]:
    """At which commit the hub datasets of tasks will be read, by path and subset. lm-eval asks for none, and
    `datasets` then takes the hub's main branch or, where the hub cannot be reached, the newest rows in its cache.
    Raises UserError as `check_tasks` does, and where neither is there."""
    return {f"{path}/{name or ''}": _commit(path, name) for path, name in task_datasets(tasks, include, data_dir)}


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
