"""Answer checkers: does a written answer end in the same final answer as the reference?

Each is a plain function (answer, reference) -> bool, chosen in a dataset's configuration.
"""

from __future__ import annotations

import re
from fractions import Fraction

from sddx.records import UserError

_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w)\]])[-−])?    # none in "5-3", "5 - 3" and in a list's "- 3"
    [$€£]?
    (?<![^\W_])                    # no number in "cm2" and "x1"
    (?:
        (?<!/)(?:(?P<whole>\d+)[ ])?(?P<top>\d+)/(?P<bottom>\d+)(?![\d/]|[.,]\d)   # not the date 3/4/2020
      | (?P<decimal>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)
    )
    """,
    re.VERBOSE,
)
_LONGEST_NUMBER = 100
_STATED = r"[\s:=*\"'(\[]*"
_LETTERS = (
    re.compile(r"boxed\{\W*(?:text\{)?\W*([A-J])\b"),
    re.compile(rf"(?i:\banswer\b{_STATED}(?:(?:is|was|choice|option|would be)\b{_STATED})*)([A-J])\b(?!['’])"),
    re.compile(rf"(?i:\b(?:option|choice)\b{_STATED}(?:is\b{_STATED})?)([A-J])\b(?!['’])"),
    re.compile(r"\(([A-J])\)"),
    re.compile(r"\b([A-J])\W*$"),
    re.compile(r"^\W*([A-J])[.):]", re.MULTILINE),
)


def final_number(text: str) -> Fraction | None:
    """The last number of a text, exactly: `#### 72`, `$1,234.50`, `50%` (50), `-3`, `3/4`, `1 1/2`,
    `\\frac{3}{4}`.

    After a GSM8K mark only what follows the last `####` counts. A percentage is read as the number before its
    sign. None where there is no number, or where it has more than 100 characters (a model that repeats
    itself).
    """
    found = list(_NUMBER.finditer(_plain(text.rsplit("####", 1)[-1])))
    if not found or len(found[-1].group()) > _LONGEST_NUMBER:
        return None
    part = found[-1].groupdict()
    if part["decimal"]:
        value = Fraction(part["decimal"].replace(",", ""))
    elif int(part["bottom"]) == 0:
        return None
    else:
        value = int(part["whole"] or 0) + Fraction(int(part["top"]), int(part["bottom"]))
    return -value if part["sign"] else value


def last_number(answer: str, reference: str) -> bool:
    """Whether both end in the same number, compared exactly (3.0 equals 3; see `final_number`).

    The rule of SDFT for mathematics (facts A5), but stricter: where neither number can be read, SDFT's code
    finds them equal and accepts; here such an answer is refused, as is every answer to an unreadable
    reference.
    """
    number = final_number(answer)
    return number is not None and number == final_number(reference)


def exact(answer: str, reference: str) -> bool:
    """Whether both are the same text, up to the amount of white space."""
    return answer.split() == reference.split()


def final_letter(text: str) -> str | None:
    """The chosen option, A to J: a boxed or stated answer ("answer is B"), an option named, a letter in
    brackets, a letter that ends the text, or one that begins a line ("B. ..."), in this order; the last one
    of its kind."""
    for pattern in _LETTERS:
        if found := pattern.findall(text.strip()):
            return found[-1]
    return None


def multiple_choice(answer: str, reference: str) -> bool:
    """Whether both choose the same letter (see `final_letter`); False where one of them names none."""
    letter = final_letter(answer)
    return letter is not None and letter == final_letter(reference)


def regular_expression(answer: str, reference: str, *, pattern: str) -> bool:
    """Whether the last match of `pattern` (its first group, where it has one) is the same text in both.

    False where one of them has no match. Raises UserError for a pattern that does not compile.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"The checker's pattern is no regular expression: {error}. Given: {pattern!r}. "
            "Mend dataset.check.pattern (Python's `re` syntax)."
        ) from None
    written, expected = (list(expression.finditer(text)) for text in (answer, reference))
    if not written or not expected:
        return False
    group = 1 if expression.groups else 0
    return (written[-1].group(group) or "").strip() == (expected[-1].group(group) or "").strip()


def none(answer: str, reference: str) -> bool:
    """No check: every answer passes (open instructions have no final answer to compare)."""
    return True


def _plain(text: str) -> str:
    """The text with LaTeX fractions, separators and exponents written so that numbers can be found."""
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    text = re.sub(r"(\d)\s*\\[dt]?frac", r"\1 \\frac", text)
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    return re.sub(r"\^\{?[-−]?\d+\}?", "", text)
