"""Datasets: rows of a local file or of the hub as examples in one seeded order.

`prompt` and `response` each name a column, or are a format string over columns: "{instruction}\\n{input}" (see
`sddx.data.cells`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sddx.data.cells import fill
from sddx.data.remarks import numbered, remark, setting
from sddx.data.tables import read_table
from sddx.errors import UserError
from sddx.hub import COMMIT, commit, unpacked
from sddx.records import Count, Dataset, Example, Natural, Seed

Check = Callable[[str, str], bool]


def jsonl(
    *,
    path: str,
    prompt: str,
    response: str,
    size: Count | None,
    seed: Seed,
    check: Check,
    rewrite: str,
    trains: Sequence[str] = (),
    id: str | None = None,
) -> Dataset:
    """The first `size` rows (None: all), in the order of `seed`, of a local file: JSON lines, one JSON array
    of objects, or Parquet (`.parquet`).

    `id` is a column or a format string that names a row: where it stands in the order, and so whether it is held
    out, hangs on that alone, so that other answers to the same prompts stand in the same order. None: on prompt and
    response.

    Raises UserError for a file that is missing, empty or damaged, for a column that does not exist or holds what
    is no text, where no row has both a prompt and a response, and for more rows than there are.
    """
    examples = _examples(read_table(Path(path)), {"prompt": prompt, "response": response}, id, where=path)
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
    size: Count | None,
    seed: Seed,
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
    examples = _examples(rows, {"prompt": prompt, "response": response}, where=name)
    return Dataset(_head(examples, size, seed, where=name), check, rewrite, tuple(trains))


def texts(*, path: str, column: str, size: Count | None, seed: Seed, min_characters: Natural = 0) -> list[str]:
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
    size: Count | None,
    seed: Seed,
    min_characters: Natural = 0,
) -> list[str]:
    """As `texts`, for a dataset of the hub, or its rows in the local file `data_files` (see `hub`)."""
    rows = _hub_rows(name, subset, split, revision, data_files)
    return _texts(rows, column, min_characters, size, seed, name)


def _texts(
    rows: Iterable[dict[str, Any]], column: str, min_characters: int, size: int | None, seed: int, where: str
) -> list[str]:
    examples = _examples(rows, {"column": column}, where=where)
    if not (long := [example for example in examples if len(example.prompt) >= min_characters]):
        raise UserError(
            f"No row of {where} has {setting('min_characters')}={min_characters} in {column!r}. Ask for fewer."
        )
    return [example.prompt for example in _head(long, size, seed, where=where)]


def pinned(node: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration node of `hub` or `hub_texts` with its revision resolved to a commit, so that a dataset is
    known by its content; a node whose rows are in a local file, and any other, as it is. Raises UserError where
    the hub cannot be asked and no fetch noted the commit."""
    return {**node, "revision": commit(node["name"], node["revision"])} if of_hub(node) else dict(node)


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


def _examples(
    rows: Iterable[dict[str, Any]], templates: Mapping[str, str], id: str | None = None, *, where: str
) -> list[Example]:
    """One example a row, in the order of the rows, by the templates of prompt and response or, of texts, of the
    one `column` that is both. Rows with an empty one are left out; they, and rows that repeat others, are told with
    their number. An id is a digest of the content, or of what the template `id` gives, numbered where a row repeats
    another. Raises UserError as `fill` does, and where no row is left."""
    rows = list(rows)
    columns = sorted({column for row in rows for column in row})
    texts = _filled(templates, rows, columns, where)
    pairs = list(zip(texts[0], texts[-1], strict=True))
    if not any(all(pair) for pair in pairs):
        assignments = ", ".join(f"{setting(name)}={template!r}" for name, template in templates.items())
        raise UserError(
            f"No row of {where} has a {' and a '.join(templates)}. Given: {len(rows)} rows, {assignments}. Choose "
            f"columns that hold text: {', '.join(columns)}."
        )
    if empty := [number for number, pair in enumerate(pairs, 1) if not all(pair)]:
        lacking = f"{len(empty)} of {len(rows)} rows lack a {' or a '.join(templates)}"
        remark(f"{where}: {lacking}: left out ({numbered(empty)})")
    seen: dict[str, int] = {}
    names = pairs if id is None else _names(id, rows, columns, where)
    examples = [Example(_id(name, seen), *pair) for name, pair in zip(names, pairs, strict=True) if all(pair)]
    if repeats := len(examples) - len(seen):
        remark(
            f"{where}: {repeats} of {len(rows)} rows repeat another row: they come after all others in their order"
        )
    return examples


def _names(id: str, rows: list[dict[str, Any]], columns: list[str], where: str) -> list[tuple[str, ...]]:
    """What the template `id` calls each row. Raises UserError unless each has a name of its own."""
    (names,) = _filled({"id": id}, rows, columns, where)
    often = Counter(names)
    if odd := [number for number, name in enumerate(names, 1) if not name or often[name] > 1]:
        raise UserError(
            f"{where}: {len(odd)} of {len(rows)} rows have no name of their own by {setting('id')}={id!r} "
            f"({numbered(odd)}). Choose a column in which every row says something else, or null."
        )
    return [(name,) for name in names]


def _filled(
    templates: Mapping[str, str], rows: list[dict[str, Any]], columns: list[str], where: str
) -> list[list[str]]:
    """The texts of each template. Raises UserError with what is wrong with any."""
    filled: list[list[str]] = []
    wrong: list[str] = []
    for name, template in templates.items():
        try:
            filled.append(fill(name, template, rows, columns, where))
        except UserError as error:
            wrong += error.args
    if wrong:
        raise UserError(*dict.fromkeys(wrong))
    return filled


def _id(name: tuple[str, ...], seen: dict[str, int]) -> str:
    digest = hashlib.sha256(json.dumps(name).encode()).hexdigest()[:16]
    seen[digest] = seen.get(digest, -1) + 1
    return f"{digest}-{seen[digest]}" if seen[digest] else digest


def _head(examples: list[Example], size: int | None, seed: int, *, where: str) -> list[Example]:
    """The first `size` examples in the order of `seed`: by a digest of seed and id, so it neither hangs on
    Python's random numbers nor on the order of the file, and each size is the head of every larger one. Rows that
    repeat another come last, so that those held out before them can be left out there."""
    if size is not None and not 1 <= size <= len(examples):
        raise UserError(
            f"{where} cannot give {size} rows ({setting('size')}, with those that are held out for validation): it "
            f"has {len(examples)} that are whole. Ask for no more, or for all with {setting('size')}=null."
        )
    return sorted(examples, key=lambda example: ("-" in example.id, _rank(seed, example.id)))[:size]


def _rank(seed: int, id: str) -> bytes:
    return hashlib.sha256(f"{seed}/{id}".encode()).digest()
