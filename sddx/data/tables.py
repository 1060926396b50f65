"""The rows of a local file: JSON lines, one JSON array of objects, Parquet, or plain text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sddx.data.remarks import numbered, setting
from sddx.errors import UserError
from sddx.files.lines import lines

HUB = "path (data_files for rows of the hub)"


def read_table(path: Path, named: str = HUB) -> list[dict[str, Any]]:
    """The rows of a file, which settings give as `named`; of plain text (.txt, .raw) its lines. Raises UserError
    where it cannot be read, is damaged or empty, holds columns instead of rows, or where a row is no object."""
    path, mend = path.expanduser(), f"Mend {setting(named)}."
    _require_file(path, mend)
    try:
        rows = READERS.get(path.suffix, _json)(path, mend)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}. {mend}") from None
    if not rows:
        raise UserError(f"{path} is empty. Give a file with at least one row. {mend}")
    if strange := [place for place, row in enumerate(rows, 1) if not isinstance(row, dict)]:
        raise UserError(
            f"{path}, {numbered(strange)}: no object with columns. Given: {str(rows[strange[0] - 1])[:80]!r}. "
            'Write each row as {"column": "text", ...}.'
        )
    if len(rows) == 1 and _is_columns(rows[0]):
        raise UserError(
            f"{path} is one object that holds whole columns ({', '.join(rows[0])}). Write one object a row: with "
            'pandas, to_json("rows.jsonl", orient="records", lines=True).'
        )
    return rows


def _require_file(path: Path, mend: str) -> None:
    """Raises UserError where there is no file at a path, with what is there instead."""
    try:
        if path.is_file():
            return
        what = "is a folder, and one file of rows is needed" if path.is_dir() else "is no file of rows"
        if path.is_symlink() and not path.exists():
            what = f"is a link to {path.readlink()}, which is not there"
        elif not path.exists():
            what = f"is not there (looked in {path.absolute().parent})"
    except OSError as error:  # a folder on the way may not be entered, a name may be too long
        what = f"cannot be read: {error.strerror}"
    raise UserError(f"{path} {what}. {mend}")


def _lines(path: Path, mend: str) -> list[str]:
    try:
        return lines(path, "utf-8-sig")
    except UnicodeDecodeError as error:
        packed = " It is compressed: unpack it." if path.read_bytes()[:2] == b"\x1f\x8b" else ""
        raise UserError(
            f"{path} is not UTF-8 text ({error}).{packed} Save it as UTF-8, or as Parquet (.parquet). {mend}"
        ) from None


def _text(path: Path, mend: str) -> list[Any]:
    """Each line that is not empty, in the column `text`, as the hub has WikiText's files."""
    return [{"text": line} for line in _lines(path, mend) if line.strip()]


def _json(path: Path, mend: str) -> list[Any]:
    """The values of a JSON array, or of each line."""
    texts = _lines(path, mend)
    if texts and (texts[0].lstrip().startswith("[") or texts[0].strip() == "{"):
        texts = ["\n".join(texts)]  # one value over many lines
    values, damaged = [], []
    for place, line in enumerate(texts, 1):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            damaged.append((place, f"{error}. Given: {line[:80]!r}"))
    if damaged:
        raise UserError(
            f"{path} is neither JSON lines nor a JSON array: {numbered([place for place, _ in damaged])}: "
            f"{damaged[0][1]}. Write one JSON object a line."
        )
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _is_columns(row: dict[str, Any]) -> bool:
    """Whether an object is a whole table, as lists or, by pandas, as objects of as many entries a column."""
    lengths = {len(value) if isinstance(value, (list, dict)) else 0 for value in row.values()}
    return len(row) > 1 and len(lengths) == 1 and lengths != {0}


def _parquet(path: Path, mend: str) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path} cannot be read as Parquet: {error}. Write it again, or use JSON lines. {mend}"
        ) from None


READERS = {".parquet": _parquet, ".txt": _text, ".raw": _text}  # all others hold JSON
