"""Datasets: rows of a local file or of the hub as examples in one seeded order.

`prompt` and `response` each name a column, or are a format string over columns: "{instruction}\\n{input}".
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

from sddx.build import build
from sddx.hub import COMMIT, commit, unpacked
from sddx.records import Dataset, Example, UserError

_log = logging.getLogger(__name__)

Check = Callable[[str, str], bool]


def jsonl(
    *,
    path: str,
    prompt: str,
    response: str,
    size: int | None,
    seed: int,
    check: Check,
    rewrite: str,
    trains: Sequence[str] = (),
) -> Dataset:
    """The first `size` rows (None: all), in the order of `seed`, of a local file: JSON lines, one JSON array
    of objects, or Parquet (`.parquet`).

    Raises UserError for a file that is missing, empty or damaged, for a column that does not exist, where no
    row has both a prompt and a response, and for more rows than there are.
    """
    examples = _examples(read_table(Path(path)), prompt, response, where=path)
    return Dataset(_head(examples, size, seed, where=path), check, rewrite, tuple(trains))


def hub(
    *,
    name: str,
    subset: str | None,
    split: str,
    revision: str | None,
    data_files: str | None = None,
    only: Mapping[str, Any] | None = None,
    prompt: str,
    response: str,
    size: int | None,
    seed: int,
    check: Check,
    rewrite: str,
    trains: Sequence[str] = (),
) -> Dataset:
    """As `jsonl`, for a dataset of the Hugging Face hub at one `revision` (a commit, for a result to be
    repeated). `data_files` is a local file of the same rows, as `jsonl` reads it: the hub is then not asked, and
    `subset`, `split` and `revision` mean nothing. `only` leaves the rows whose columns have these values.

    Raises UserError also where it cannot be reached, or has no such subset, split or revision, and where `only`
    leaves no row.
    """
    rows = _only(only or {}, _hub_rows(name, subset, split, revision, data_files), name)
    examples = _examples(rows, prompt, response, where=name)
    return Dataset(_head(examples, size, seed, where=name), check, rewrite, tuple(trains))


def texts(*, path: str, column: str, size: int | None, seed: int, min_characters: int = 0) -> list[str]:
    """Calibration texts: the first `size` rows, in the order of `seed`, of a file that `jsonl` reads, without those
    of fewer than `min_characters`. `column` is a column or a format string. Raises UserError as `jsonl` does, and
    where every row is shorter."""
    return _texts(read_table(Path(path)), column, min_characters, size, seed, path)


def hub_texts(
    *,
    name: str,
    subset: str | None,
    split: str,
    revision: str | None,
    data_files: str | None = None,
    column: str,
    size: int | None,
    seed: int,
    min_characters: int = 0,
) -> list[str]:
    """As `texts`, for a dataset of the hub, or its rows in the local file `data_files` (see `hub`)."""
    rows = _hub_rows(name, subset, split, revision, data_files)
    return _texts(rows, column, min_characters, size, seed, name)


def _texts(
    rows: Iterable[dict[str, Any]], column: str, min_characters: int, size: int | None, seed: int, where: str
) -> list[str]:
    found = _examples(rows, column, column, where=where)
    if not (long := [example for example in found if len(example.prompt) >= min_characters]):
        raise UserError(f"No row of {where} has min_characters={min_characters} in {column!r}. Ask for fewer.")
    return [example.prompt for example in _head(long, size, seed, where=where)]


def pinned(node: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration node of `hub` or `hub_texts` with its revision resolved to a commit, so that a dataset is
    known by its content; a node whose rows are in a local file, and any other, as it is. Raises UserError where
    the hub cannot be asked and no fetch noted the commit."""
    return {**node, "revision": commit(node["name"], node["revision"])} if of_hub(node) else dict(node)


def require_rows(node: Mapping[str, Any]) -> None:
    """Raises UserError where a node's rows cannot be had: the local file that holds them is missing, damaged, or
    not what is asked for; or `pinned` does."""
    if node.get("path") or node.get("data_files"):
        _read_once(json.dumps(node, sort_keys=True))
    pinned(node)


@cache  # asked for every cell of a grid
def _read_once(node: str) -> None:
    build(json.loads(node))


def of_hub(node: Mapping[str, Any]) -> bool:
    """Whether a node's rows come from the hub: one of `hub` or `hub_texts` that names no local file."""
    return {"name", "revision"} <= node.keys() and not node.get("data_files")


def _hub_rows(
    name: str, subset: str | None, split: str, revision: str | None, data_files: str | None
) -> Iterable[dict[str, Any]]:
    if data_files is not None:
        return read_table(Path(data_files))
    return from_hub(name, subset, split=split, revision=revision)


def from_hub(name: str, subset: str | None, *, split: str | None, revision: str | None) -> Any:
    """The rows of a dataset of the hub, from the cache of `datasets` where they are in it; of all splits, by name,
    where `split` is None. Raises UserError where it cannot be loaded, and where another commit would be read."""
    import datasets

    pin = revision if COMMIT.fullmatch(revision or "") else None
    try:
        if pin and (here := unpacked(name, subset or "default", pin)):
            return _from_cache(name, here[0], split)
        rows = datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # the libraries below raise a dozen kinds, and each is the user's to mend
        raise UserError(
            f"The dataset cannot be loaded: {type(error).__name__}: {error}. Given: name={name}, "
            f"subset={subset}, split={split}, revision={revision}. Check the name, the network and (for a "
            "gated dataset) `hf auth login`; rows in a local file are given as data_files=rows.jsonl, and "
            "dataset=tiny_arithmetic needs no network."
        ) from error
    # Without a network, `datasets` takes what it prepared last, whatever the revision that is asked for.
    others = _commits(rows) - {pin} if pin else None
    if others:
        raise UserError(
            f"dataset {name} was asked for at commit {revision}, and without a network its cache "
            f"({datasets.config.HF_DATASETS_CACHE}) gives {', '.join(sorted(others))}, the last that was prepared. "
            "Ask for that one, remove it there, or run where there is a network."
        )
    return rows


def _from_cache(name: str, folder: Path, split: str | None) -> Any:
    """The rows that `datasets` unpacked into a folder of its cache."""
    from datasets.packaged_modules.cache.cache import Cache

    subset, version, at = folder.parts[-3:]
    builder = Cache(dataset_name=name.split("/")[-1], repo_id=name, config_name=subset, version=version, hash=at)
    return builder.as_dataset(split=split)


def _commits(rows: Any) -> set[str]:
    """The commits that prepared rows come from: the folders in the cache of `datasets` are named by them."""
    splits = rows.values() if isinstance(rows, Mapping) else [rows]
    files = [Path(file["filename"]) for split in splits for file in getattr(split, "cache_files", [])]
    return {file.parent.name for file in files if COMMIT.fullmatch(file.parent.name)}


def _only(wanted: Mapping[str, Any], rows: Iterable[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The rows whose columns have the wanted values. Raises UserError where there is none."""
    kept = [row for row in rows if all(row.get(column) == value for column, value in wanted.items())]
    if not kept:
        raise UserError(
            f"No row of {where} has {dict(wanted)}. Name columns and values that it has in dataset.only, or "
            "set it to null for all rows."
        )
    return kept


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines, JSON array or Parquet file. Raises UserError where it is missing, damaged or
    empty."""
    path = path.expanduser()
    if not path.is_file():
        raise UserError(
            f"There is no dataset file {path} (looked in {path.absolute().parent}). "
            "Mend its path (dataset.path, or data_files for rows of the hub)."
        )
    rows = _parquet(path) if path.suffix == ".parquet" else _json(path)
    if not rows:
        raise UserError(f"The dataset file {path} is empty. Give a file with at least one row.")
    strange = next((place for place, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if strange:
        raise UserError(
            f"Row {strange} of {path} is no object with columns. Given: {str(rows[strange - 1])[:80]!r}. "
            'Write each row as {"column": "text", ...}.'
        )
    return rows


def _json(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8, or as Parquet.") from None
    try:
        if text.startswith("["):
            return json.loads(text)
        # Only "\n" ends a line: str.splitlines would also cut inside texts that hold other separators.
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is neither JSON lines nor a JSON array: {error.msg}. Given: {error.doc[:80]!r}. "
            "Write one JSON object a line."
        ) from None


def _parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}. Write it again, or use JSON lines.") from None


def _examples(rows: Iterable[dict[str, Any]], prompt: str, response: str, *, where: str) -> list[Example]:
    """One example a row, in the order of the rows; those with an empty prompt or response are left out, with
    a warning that counts them. An id is a digest of the content, numbered where a row repeats another."""
    rows = list(rows)
    columns = sorted({column for row in rows for column in row})
    prompts, responses = (_fill(template, rows, columns, where) for template in (prompt, response))
    pairs = [pair for pair in zip(prompts, responses, strict=True) if all(pair)]
    if not pairs:
        raise UserError(
            f"No row of {where} has both a prompt and a response. Given: {len(rows)} rows, "
            f"prompt={prompt!r}, response={response!r}. Choose columns that hold text: {', '.join(columns)}."
        )
    if len(pairs) < len(rows):
        empty = len(rows) - len(pairs)
        _log.warning("%s: %d of %d rows lack a prompt or a response: left out", where, empty, len(rows))
    seen: dict[str, int] = {}
    return [Example(_id(pair, seen), *pair) for pair in pairs]


def _fill(template: str, rows: Sequence[dict[str, Any]], columns: list[str], where: str) -> list[str]:
    """The template's text for every row, without white space around it. A column that a row lacks is empty
    there."""
    if template in columns:
        return [_text(row.get(template)) for row in rows]
    fields = _fields(template)
    for missing in [field for field in fields if field not in columns] or ([] if fields else [template]):
        near = get_close_matches(missing, columns, n=3)
        raise UserError(
            f"{where} has no column {missing!r}. Given: {template!r}. Columns: {', '.join(columns)}."
            + (f" Near names: {', '.join(near)}." if near else "")
            + " Set dataset.prompt and dataset.response (of texts, column) to a column or a text with {column}s."
        )
    try:
        return [_text(template.format_map(dict.fromkeys(fields, "") | _filled(row))) for row in rows]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"The template does not fit every row of {where}: {error}. Given: {template!r}. Name columns, or "
            "parts of them that every row has."
        ) from None


def _filled(row: dict[str, Any]) -> dict[str, Any]:
    return {column: value for column, value in row.items() if value is not None}


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _fields(template: str) -> list[str]:
    """The columns that a format string names; `{choices[0]}` names `choices`."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(
            f"The template is malformed: {error}. Given: {template!r}. Write columns as {{column}} and a "
            "brace as {{ or }}."
        ) from None
    return [name.split("[")[0].split(".")[0] for name in names]


def _id(pair: tuple[str, str], seen: dict[str, int]) -> str:
    digest = hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:16]
    seen[digest] = seen.get(digest, -1) + 1
    return f"{digest}-{seen[digest]}" if seen[digest] else digest


def _head(examples: list[Example], size: int | None, seed: int, *, where: str) -> list[Example]:
    """The first `size` examples in the order of `seed`: by a digest of seed and id, so it neither hangs on
    Python's random numbers nor on the order of the file, and each size is the head of every larger one."""
    if size is not None and not 1 <= size <= len(examples):
        raise UserError(
            f"{where} cannot give {size} rows (size, with those that are held out for validation): it has "
            f"{len(examples)} that are whole. Ask for no more, or for all with size=null."
        )
    return sorted(examples, key=lambda example: _rank(seed, example.id))[:size]


def _rank(seed: int, id: str) -> bytes:
    return hashlib.sha256(f"{seed}/{id}".encode()).digest()
