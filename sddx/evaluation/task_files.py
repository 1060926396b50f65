"""Rows of evaluation tasks in local files, in the columns that the hub has, in place of the hub.

`FOLDER/<task>.jsonl` (or .json, .parquet) holds the rows of the split that a task evaluates, `<task>.<split>.jsonl`
those of one that is named. The task's own YAML does with them what it does with the hub's: only where the rows
come from is another. Importing this module is cheap; behaviour that is relied on was read in lm-eval 0.4.13.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from keyword import iskeyword
from pathlib import Path
from typing import Any

from sddx.errors import UserError
from sddx.evaluation.seeds import seeded
from sddx.records import Artifact

ROWS = "task_rows"  # what a folder of rows is called among the inputs of a stage
KINDS = (".jsonl", ".json", ".parquet")
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
READS = ("doc_to_text", "doc_to_target", "doc_to_choice")  # what a task takes from a row


def folder_of(data_dir: str | None, setting: str = "evaluation") -> Path | None:
    """The folder; None for None. Raises UserError, which names the group of settings, where it is none."""
    if data_dir is None:
        return None
    folder = Path(data_dir).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(
            f"{setting}.data_dir={data_dir} is no folder. Give one that holds the rows of tasks as "
            "<task>.jsonl, or null to read the hub."
        )
    return folder


def files_of(task: str, data_dir: str | None) -> dict[str, Path]:
    """The files of a task by split; under "" that of the split which it evaluates. Empty where there is none.
    Raises UserError for two files of one split."""
    folder, files = folder_of(data_dir), dict[str, Path]()
    for path in sorted(folder.glob(f"{task}.*")) if folder else ():
        split = path.name.removesuffix(path.suffix).removeprefix(task).removeprefix(".")
        if path.suffix not in KINDS or "." in split:
            continue
        if split in files:
            raise UserError(f"{folder} has {files[split].name} and {path.name} for {task!r}. Keep one of them.")
        files[split] = path
    return files


def placed(settings: Any, inputs: Sequence[Artifact]) -> Any:
    """Settings in which each `data_dir`, that is told by the key of an input, is the folder where that lies."""
    if not isinstance(settings, dict):
        return settings
    folders = {artifact.key: str(artifact.path) for artifact in inputs if artifact.stage == ROWS}
    values = {name: placed(value, inputs) for name, value in settings.items()}
    key = settings.get("data_dir")
    return {**values, "data_dir": folders.get(key, key)} if key is not None else values


def on_hub(source: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """What a task's settings read from the hub, as (path, name) of `datasets.load_dataset`; None for other data."""
    path, options = source.get("dataset_path"), source.get("dataset_kwargs") or {}
    if path is None or source.get("custom_dataset") or Path(path).exists():
        return None
    # `json`, `parquet` and their like are no datasets, but ways to read the files that are given.
    reader = "/" not in path and ("data_files" in options or "data_dir" in options)
    return None if reader else (path, source.get("dataset_name"))


def no_file(tasks: list[str], data_dir: str) -> str:
    """What is said of tasks whose rows are in no file."""
    more = f" and of {len(tasks) - 3} more" if len(tasks) > 3 else ""
    named = ", ".join(f"{task}.jsonl (task {task!r})" for task in tasks[:3])
    return (
        f"{folder_of(data_dir)} lacks rows: {named}{more}. Put them there in the hub's columns, leave the "
        "tasks out, or set data_dir to null to read the hub."
    )


def reading(manager: Any, data_dir: str | None, asked: str | None = None) -> Any:
    """lm-eval's TaskManager with tasks that take their rows from `data_dir` (None: the manager as it is). `asked`
    is the split that will be evaluated in place of their own."""
    if data_dir is None:
        return manager
    folder = data_dir
    from lm_eval.tasks._factory import TaskFactory

    class LocalRows(TaskFactory):
        def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
            return _local(super()._load_full_config(entry, overrides), folder, asked)

    changed = copy.copy(manager)
    changed._factory = LocalRows()
    return changed


def _local(config: dict[str, Any], data_dir: str, asked: str | None) -> dict[str, Any]:
    """A task's settings with its rows from files. Raises UserError for a task whose rows would come from the hub
    otherwise, and for files that it cannot use."""
    task = config.get("task")
    if not isinstance(task, str) or "group" in config:
        return config
    if not (files := files_of(task, data_dir)):
        if on_hub(config):
            raise UserError(no_file([task], data_dir))
        return config
    if "class" in config:
        raise UserError(f"its rows are read by code of its own, and not from {next(iter(files.values()))}.")
    judged = str(config.get("test_split") or config.get("validation_split") or "test")
    named = {split or judged: path for split, path in files.items()}
    if len(named) < len(files):
        raise UserError(f"{files['']} and {files[judged]} both hold its split {judged!r}. Keep one of them.")
    rows = {split: _rows(path) for split, path in named.items()}
    for split, path in named.items():
        _require_columns(config, rows[split], path)
    wanted = asked or judged
    if wanted not in rows:
        raise UserError(f"{folder_of(data_dir)} lacks the split that is judged: {task}.{wanted}.jsonl.")
    # lm-eval looks at the first row of the task's own split, also where another one will be evaluated.
    rows = {**dict.fromkeys(_splits(config), rows[wanted].select([])), judged: rows[wanted], **rows}
    return {**config, "custom_dataset": Rows(rows, folder_of(data_dir)), "dataset_kwargs": None}


class Rows:
    """Rows by split, as an lm-eval `custom_dataset`; a split without a file has none."""

    def __init__(self, rows: Mapping[str, Any], folder: Path | None) -> None:
        self.rows, self.folder = dict(rows), folder

    def __call__(self, **_: Any) -> dict[str, Any]:
        return self.rows

    def __deepcopy__(self, _: Any) -> Rows:
        return self  # lm-eval copies settings to print them


def _splits(config: Mapping[str, Any]) -> Iterator[str]:
    shown = config.get("fewshot_config")
    named = [config.get(name) for name in SPLITS] + [shown.get("split") if isinstance(shown, Mapping) else None]
    yield from (split for split in named if split)


def examples_split(task: Any) -> str:
    """The split that a loaded task takes its examples from, by lm-eval's rule."""
    names = [task.fewshot_cfg.split, *(task.get_config(name) for name in SPLITS[:3])]
    return next(filter(None, names))


def _rows(path: Path) -> Any:
    """The rows of a file. Raises UserError where it cannot be read, or has not the same columns in every row."""
    stat = path.stat()
    return _rows_of(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)  # tasks are tried before a run and loaded for each model
def _rows_of(path: Path, *_: int) -> Any:
    from sddx.data.tables import read_table

    rows = read_table(path, "data_dir")
    columns = dict.fromkeys(name for row in rows for name in row)
    for number, row in enumerate(rows, 1):
        if lacking := [name for name in columns if name not in row]:
            raise UserError(f"{path}, row {number} has no {', '.join(map(repr, lacking))}, and other rows have.")
    return as_dataset(rows, path)


def as_dataset(rows: list[dict[str, Any]], path: Path) -> Any:
    """The rows of a file as a Dataset. Raises UserError where a column holds now this kind of value, now that."""
    import datasets

    try:
        return datasets.Dataset.from_list(rows)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is no table: {' '.join(str(error).split())}.") from error


def _require_columns(config: Mapping[str, Any], rows: Any, path: Path) -> None:
    """Raises UserError for columns that a task reads and that a file lacks, as far as its first row tells."""
    with seeded():  # the author's code may draw, and is to draw the same when it is run
        lacking = _lacking_columns(config, rows.select(range(1)))
    if lacking:
        raise UserError(
            f"{path} has no column {', '.join(map(repr, dict.fromkeys(lacking)))}, which the task "
            f"{config['task']!r} reads; it has {', '.join(rows.column_names)}."
        )


def _lacking_columns(config: Mapping[str, Any], rows: Any) -> list[str]:
    process = config.get("process_docs")
    try:
        documents = process(rows) if callable(process) else rows
    except KeyError as error:
        # What the author looks up elsewhere is told where the task is loaded, as is all that the code raises.
        return [str(error.args[0])] if _of_datasets(error) else []
    except Exception:
        return []
    row = documents[0] if len(documents) else {}
    return [name for read in READS if row for name in _lacking(config.get(read), row)]


def _of_datasets(error: BaseException) -> bool:
    """Whether a row of `datasets` was asked for a column, and not a mapping of the author's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("datasets.")


class Lacking(KeyError):
    """A document has no such column."""

    pass


class Row(dict):
    """A document that tells a column which it lacks from any other missing key."""

    def __missing__(self, name: str) -> Any:
        raise Lacking(name)


def _lacking(read: str | Callable | Any, row: dict[str, Any]) -> list[str]:
    """The columns that a template, a name or a function asks a document for in vain."""
    if not isinstance(read, str):
        return _asked_in_vain(read, row) if callable(read) else []
    if read.isidentifier() and not iskeyword(read):
        return [read] if read not in row else []  # which lm-eval would show as it stands
    from jinja2 import Environment, StrictUndefined, UndefinedError, meta
    from lm_eval.utils import env

    class Missing(StrictUndefined):
        __repr__ = StrictUndefined.__str__  # in a list of choices it would be shown as "Undefined"

    try:
        names = meta.find_undeclared_variables(env.parse(read)) - env.globals.keys() - row.keys()
        Environment.from_string(env.overlay(undefined=Missing), read).render(**row)
    except UndefinedError:
        return sorted(names)
    except Exception:  # told where the task is loaded
        return []
    return []


def _asked_in_vain(read: Callable, row: dict[str, Any]) -> list[str]:
    try:
        read(Row(row))
    except Lacking as error:
        return [str(error.args[0])]
    except Exception:  # told where the task is loaded
        return []
    return []
