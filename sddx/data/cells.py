"""Templates over columns: a row's text, which is what the row says or a mistake."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from difflib import get_close_matches
from string import Formatter
from typing import Any

from sddx.data.remarks import numbered, remark, setting
from sddx.data.templates import line_breaks
from sddx.errors import UserError

Row = Mapping[str, Any]
_SURROGATE = re.compile("[\ud800-\udfff]")
_EXACT = 2**53  # from here on a float skips whole numbers


class _NoText(Exception):
    """What a cell holds is no text; the message says what it is and what to do."""


def fill(name: str, template: str, rows: Sequence[Row], columns: Sequence[str], where: str) -> list[str]:
    """The text of a template (a column, or a format string over columns) for every row, without white space around
    it; `name` is the setting that holds the template.

    A column that a row lacks, null and NaN are empty there; whole numbers that a table holds as floats throughout a
    column are written as whole numbers, and that is told, as NaN is. Raises UserError, with all that is wrong, for
    a column that there is not, and for rows whose cells are no text: lists and objects, bytes, infinite numbers,
    half of a surrogate pair, and those that the format string does not fit.
    """
    plain, assignment = template in columns, f"{setting(name)}={template!r}"
    if not plain and (broken := line_breaks(template)) != template:
        remark(f"{where}: backslash-n in {template!r} is read as a line break")
        template = broken
    fields = [template] if plain else _fields(template, assignment)
    _require(fields or [template], assignment, columns, where)
    whole = {column for column in set(fields) if _is_whole(column, rows, where)}
    write: Callable[[Row], str] = (lambda row: text_of(row.get(template))) if plain else _writer(template, fields)
    return _written(lambda row: write(_read(row, fields, whole)), rows, where, assignment)


def _written(write: Callable[[Row], str], rows: Sequence[Row], where: str, assignment: str) -> list[str]:
    """Each row's text. Raises UserError with all that is wrong, each with the rows that it is wrong with."""
    texts: list[str] = []
    unfit: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        try:
            texts.append(write(row))
        except _NoText as error:
            unfit.setdefault(str(error), []).append(number)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            reason = f"does not fit {assignment} ({error}). Name columns, or parts of them that every row has."
            unfit.setdefault(reason, []).append(number)
    if unfit:
        raise UserError(*(f"{where}, {numbered(places)}: {reason}" for reason, places in unfit.items()))
    return texts


def text_of(value: Any) -> str:
    """A cell's text, without white space around it: empty for null and NaN, JSON's words for true and false. Raises
    _NoText for what is no text."""
    if value is None or _is_nan(value):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isinf(value):
        raise _NoText(f"{value} is no text. Leave the cell empty (null), or write the number.")
    if not isinstance(value, (str, int, float, Decimal)):
        kinds: dict[type, str] = {list: "a list", dict: "an object"}
        raise _NoText(
            f"a cell is {kinds.get(type(value), type(value).__name__)}, not a text. Name its parts in a template, "
            "as in '{messages[0][content]}', or write it as text."
        )
    text = str(value)
    if match := _SURROGATE.search(text):
        around = text[max(match.start() - 20, 0) : match.end()].encode("ascii", "backslashreplace").decode()
        raise _NoText(f"half of a surrogate pair, which is no character: ...{around}. Mend the text.")
    return text.strip()


class _Cells(Formatter):
    """Writes cells as `text_of` does, unless a format is asked for."""

    def format_field(self, value: Any, format_spec: str) -> str:
        return super().format_field(value, format_spec) if format_spec else text_of(value)


def _writer(template: str, fields: Sequence[str]) -> Callable[[Row], str]:
    cells, empty = _Cells(), dict.fromkeys(fields, "")
    return lambda row: text_of(cells.vformat(template, (), empty | dict(row)))


def _read(row: Row, fields: Sequence[str], whole: set[str]) -> Row:
    """The cells of a row that a template reads and that are there."""
    cells = {name: row[name] for name in fields if row.get(name) is not None and not _is_nan(row[name])}
    return {
        name: int(value) if name in whole and isinstance(value, float) else value for name, value in cells.items()
    }


def _is_whole(column: str, rows: Sequence[Row], where: str) -> bool:
    """Whether all floats of a column are whole numbers, as pandas writes those of which some are missing."""
    floats = [row[column] for row in rows if isinstance(row.get(column), float)]
    if missing := sum(map(math.isnan, floats)):
        remark(f"{where}: {missing} of {len(rows)} rows hold NaN in column {column!r}: read as missing")
    numbers = [value for value in floats if not math.isnan(value)]
    if not numbers or not all(value.is_integer() and abs(value) < _EXACT for value in numbers):
        return False
    remark(f"{where}: column {column!r} holds whole numbers as floats ({numbers[0]}): written as {int(numbers[0])}")
    return True


def _is_nan(value: Any) -> bool:
    return isinstance(value, (float, Decimal)) and math.isnan(value)


def _require(fields: Sequence[str], assignment: str, columns: Sequence[str], where: str) -> None:
    """Raises UserError for each field that is no column; `assignment` is the setting that names it."""
    wrong = []
    for missing in [field for field in dict.fromkeys(fields) if field not in columns]:
        near = get_close_matches(missing, columns, n=3)
        wrong.append(
            f"{where} has no column {missing!r}. Given: {assignment}. Columns: {', '.join(columns)}."
            + (f" Near names: {', '.join(near)}." if near else "")
            + " Give a column, or a text with {columns}."
        )
    if wrong:
        raise UserError(*wrong)


def _fields(template: str, assignment: str) -> list[str]:
    """The columns that a format string names; `{choices[0]}` names `choices`. Raises UserError for none such."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(
            f"{assignment} is malformed: {error}. Write columns as {{column}} and a brace as {{{{ or }}}}."
        ) from None
    return [name.split("[")[0].split(".")[0] for name in names]
