"""Answer checkers: does a written answer end in the same final answer as the reference?

Each is a plain function (answer, reference) -> bool, chosen in a dataset's configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from sddx.build import tried
from sddx.errors import UserError

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
# What follows "the answer is", up to the end of the sentence or to where it begins to explain the answer.
_STATEMENT = re.compile(
    r"\banswer\b(?:[*_ ]*[:=]|[^.?!:\n\d]{0,60}?\b(?:is|would be)\b:?)\s*([^\n]+?)"
    r"(?=[.!?;](?:\s|$)|,\s|\s\(|\s(?:because|since|as|which|so)\b|\n|$)",
    re.IGNORECASE,
)
_INLINE = re.compile(r"\W*?(?:\$|\\\()(.+?)(?:\$|\\\))\W*")
_TEXT = r"\\(?:text|mathrm|mbox)\{([^{}]*)\}"
_UNIT = re.compile(rf"\s*(?:[^\W\d_]{{2,}}(?:[ /][^\W\d_]+)*\d?|\\?%|[°$€£]|{_TEXT})?\s*")
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
    return _value(found[-1]) if found else None


def _value(number: re.Match[str]) -> Fraction | None:
    if len(number.group()) > _LONGEST_NUMBER:
        return None
    part = number.groupdict()
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


def math_answer(answer: str, reference: str) -> bool:
    """Whether both give the same answer: equal numbers, whatever their units, or the same expression (see
    `final_answer`).

    Expressions are compared as text, so `x+1` is not `1+x`: a right answer that is refused gives way to its
    reference, while a wrong one that is accepted would be trained. Two unreadable answers do not agree.
    """
    written = final_answer(answer)
    return written is not None and written == final_answer(reference)


def final_answer(text: str) -> Fraction | str | None:
    """The answer that a text commits itself to: the number after GSM8K's last `####`; else what is in its last
    `\\boxed{}`; else what it last states ("the answer is 72"); else its last number.

    A stated answer comes before the last number because chat models go on after it ("The answer is 72. I hope
    this helps, 2 things to note ..."), where SDFT's rule (`last_number`) reads 2. "The answer is 3 + 4 = 7" states
    7. A box, or a statement that is a formula between dollars, gives a number where it holds nothing else but a
    unit, or else an expression, as text without spaces and in one spelling. None where nothing can be read.
    """
    if "####" in text:
        return final_number(text)
    if (inside := _boxed(text)) is not None:
        return _formula(inside)
    stated = [answer for piece in _STATEMENT.findall(text) if (answer := _stated(piece)) is not None]
    return stated[-1] if stated else final_number(text)


def _boxed(text: str) -> str | None:
    """What stands between the braces of the last `\\boxed{`; None without one, or where it does not close."""
    _, mark, rest = text.rpartition("\\boxed{")
    depth = 1
    for place, letter in enumerate(rest if mark else ""):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[:place]
    return None


def _stated(piece: str) -> Fraction | str | None:
    """The formula, or the number at the beginning, of what is stated; of an equation its right side."""
    if formula := _INLINE.fullmatch(piece):
        return _formula(formula[1])
    right = _plain(piece).rsplit("=", 1)[-1]
    found = _NUMBER.search(right)
    return _value(found) if found and not re.search(r"\w", right[: found.start()]) else None


def _formula(formula: str) -> Fraction | str | None:
    """A number with at most a unit beside it; else the expression; None for an empty formula."""
    text = re.sub(rf"^{_TEXT}$", r"\1", _tidy(formula))
    text = re.sub(r"^[A-Za-z]\s*=", "", text).strip()  # x = 3 answers with 3
    plain = re.sub(r"^([-−]) ", r"\1", _plain(text))
    number = _NUMBER.match(plain)
    if number and not re.search(r"\d\s*\^", text) and _UNIT.fullmatch(plain, number.end()):
        return _value(number)
    return re.sub(r"\s+", "", re.sub(_TEXT, r"\1", text)) or None


def _tidy(formula: str) -> str:
    """LaTeX in one spelling, without what only changes its look."""
    text = re.sub(r"\\left|\\right|\\displaystyle|\\[,;:! ]|~", " ", formula.replace("{,}", ","))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\^\s*\{?\\circ\}?|\\degree", "°", text)
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", text).lstrip(" $").rstrip(" $.")


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


def require_checker(check: Callable[[str, str], bool]) -> None:
    """Raises UserError where a checker does not say yes or no of two texts."""
    verdict = tried("dataset.check", check, "The answer is 1.", "The answer is 2.")
    if not isinstance(verdict, bool):
        raise UserError(f"dataset.check gives {verdict!r} for two texts, where true or false is needed.")


def _plain(text: str) -> str:
    """The text with LaTeX fractions, separators and exponents written so that numbers can be found."""
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    text = re.sub(r"(\d)\s*\\[dt]?frac", r"\1 \\frac", text)
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    return re.sub(r"\^\{?[-−]?\d+\}?", "", text)
