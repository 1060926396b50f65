"""Answer checkers: does a written answer end in the same final answer as the reference?

Each is a plain function (answer, reference) -> bool, chosen in a dataset's configuration; in place of False it may
give a `Reason`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from sddx.data.written import COPIED, rouge_l
from sddx.errors import UserError
from sddx.statistics.answers import repetition

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
# An exclamation mark that ends a sentence: a factorial goes on ("5! = 120", "5! ways").
_EXCLAIMED = r"(?:\s*$|\s+(?-i:(?![a-z=+*/×÷<>-])))"
# Where what is said ends, or begins to be explained.
_END = rf"(?=[.?;](?:\s|$)|!{_EXCLAIMED}|,\s(?![-−$€£(]*\d)|\s\(|\s(?:because|since|as|which|so)\b|\n|$)"
_MARK = re.compile(rf"####[*_ ]*([^\n]+?){_END}")  # GSM8K's
_STATEMENT = re.compile(
    r"(?:\banswer\b(?:[*_ ]*[:=]|[^.?!:\n\d]{0,60}?\b(?:is|was|would be|should be|should have been)\b:?)"
    rf"|\b(?:it|this|that)\s+should (?:be|have been)\b:?)\s*([^\n]+?){_END}",
    re.IGNORECASE,
)
# Where a text takes back what it said before.
_RETRACTION = re.compile(
    r"\b(?:wait|actually|correction|oops|hold on|scratch that|my mistake)\b(?=\W*(?:[,.:;!—–-]|$))"
    r"|\b(?:made|is|was) an? (?:\w+ )?(?:mistake|error)\b"
    r"|(?:\b(?:is|was)|['’]s) (?:\w+ )?(?:wrong|incorrect)\b|(?:n['’]t|\bnot) (?:\w+ )?(?:right|correct)\b",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(
    r"\W*(?:so|therefore|thus|hence|consequently|finally|altogether|overall|in (?:total|all|conclusion)"
    r"|(?:this|that|which) means)\b",
    re.IGNORECASE,
)
# Where a text turns to its reader, and sentences that speak of the solution.
_CLOSING = re.compile(
    r"\b(?:hope (?:this|that|it)|let me know|feel free|if you (?:need|want|would|have (?:any|more|other)))\b",
    re.IGNORECASE,
)
_ASIDE = re.compile(
    r"\b(?:note|remember|check(?:ed|ing)?|verif\w+|steps?|ways?|methods?|approach(?:es)?|questions?|problems?"
    r"|solutions?|explanations?|examples?|exercises?)\b",
    re.IGNORECASE,
)
# Where sentences end.
_SENTENCES = re.compile(rf"(?<=[.?])\s+|(?<=!){_EXCLAIMED}|\n+")
# Beside a number: it is a part of a formula, a range, a list or a time, and no answer.
_JOINED = r"(?:[-−–+*/×÷^x]|\\(?:times|cdot|div)\b|(?:of|times|plus|minus)\b|(?:[^\W\d_]+\s+)?(?:or|and|to)\b)"
_GOES_ON = re.compile(
    rf"[^\W\d_]?\s*{_JOINED}\s*[-−$€£(]*\.?\d|:\d"
    r"|,\s*[-−$€£(]*\.?\d[\d.,/]*\s*(?:[.;)\],]|$|and\b|or\b)",
    re.IGNORECASE,
)
_FACTOR = re.compile(
    r"\s*(?:\\(?!(?:text|mathrm|mbox|q?quad|approx|implies|[Rr]ightarrow)\b)[A-Za-z]|[√∛π]|(?:sqrt|pi)\b"
    r"|\^(?!\{?(?:\\circ|°)))"
    rf"|!(?!{_EXCLAIMED})|(?!(?:[kcm]m|[km]g|ml|mph|lbs?|oz|ft|hrs?|mins?)\b)[^\W\d_]"
)
_AFTER_FORMULA = re.compile(
    r"(?:[√∛±<>≤≥_]|\^\{?|\\sqrt(?:\[\d+\])?\{?|(?:(?:\b|\d)[^\W\d_]|[)\]}])(?:\s*[-−–+/×÷]|\*|\s+\*\s))\s*$"
)
_OPENED, _CLOSED = re.compile(r"(?<!\\)[(\[]\s*$"), re.compile(r"[^()\[\],\d]*[)\]]")
_INLINE = re.compile(r"\W*?(?:\$|\\\()(.+?)(?:\$|\\\))\W*")
_TEXT = r"\\(?:text|mathrm|mbox)\{([^{}]*)\}"
_EQUALS = re.compile(r"(?<![<>!:=])=(?!=)|\bequals\b")
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


class Reason(str):
    """Why an answer may not be trained on, in place of False."""


def final_number(text: str) -> Fraction | None:
    """The last number of a text, exactly: `#### 72`, `$1,234.50`, `50%` (50), `-3`, `3/4`, `1 1/2`,
    `\\frac{3}{4}`.

    After a GSM8K mark only what follows the last `####` counts. A percentage is read as the number before its
    sign. None where there is no number, or where it has more than 100 characters (a model that repeats
    itself).
    """
    plain = re.sub(r"\^\{?[-−]?\d+\}?", "", _plain(text.rsplit("####", 1)[-1]))
    numbers = list(_NUMBER.finditer(plain))
    return _value(numbers[-1]) if numbers else None


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

    The rule of SDFT for mathematics (arXiv 2402.13669), but stricter: where neither number can be read, SDFT's code
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
    """The answer that a text commits itself to: the number after GSM8K's first `####`, as GSM8K's own evaluation
    and lm-eval read it; else what is in its last `\\boxed{}`; else what it last states ("the answer is 72"); else
    what its last sentence computes or concludes ("48 + 24 = 72", "So she sold 72"), or repeats of what was
    computed; else the last number of a text of which one sentence alone has numbers.

    Chat models go on after their answer ("The answer is 72. I hope this helps, 2 things to note ..."), where
    SDFT's rule (`last_number`) reads 2: sentences about the solution are passed over. What a text takes back
    ("Wait, that is wrong") counts no more, and what it says afterwards only where that is marked, boxed or stated.
    Of an equation the side that is a number answers ("3 + 4 = 7", "18 = 5 + 13"). A box, or a statement that is a
    formula between dollars, gives a number where it holds nothing else but a unit, or else an expression, as text
    without spaces and in one spelling. None where nothing can be read, and where it cannot be told which number is
    meant.
    """
    *taken_back, last = _RETRACTION.split(text)
    answer = _committed(last)
    if answer is None and all(_committed(piece) is None for piece in taken_back):
        return _concluded(text)
    return answer


def _committed(text: str) -> Fraction | str | None:
    """What a text marks, boxes or states as its answer."""
    marked = [answer for piece in _MARK.findall(text) if (answer := _stated(piece)) is not None]
    if marked and marked[:2] != [1, 2]:  # "#### 1. Add", "#### 2. Multiply" are headings
        return marked[0]
    if (inside := _boxed(text)) is not None and (answer := _formula(inside)) is not None:
        return answer
    stated = [answer for piece in _STATEMENT.findall(text) if (answer := _stated(piece)) is not None]
    return stated[-1] if stated else None


def _concluded(text: str) -> Fraction | None:
    """The number that the last sentence about the matter computes, concludes with, or repeats of what was computed;
    or its last one, where no other sentence has numbers. A calculator's `<<48/2=24>>` is no text."""
    plain = _plain(re.sub(r"<<[^<>]*>>", "", _CLOSING.split(text, maxsplit=1)[0]))
    sentences = [each for each in _SENTENCES.split(plain) if re.search(r"\d", each)]
    if not (telling := [each for each in sentences if not _is_aside(each)] or sentences):
        return None
    last, computed = telling[-1], [result for each in telling for result in _results(each)]
    numbers = list(_NUMBER.finditer(last))
    if computed and (_results(last) or computed[-1] in map(_value, numbers)):
        return computed[-1]
    if not numbers or not (len(telling) == 1 or _CONCLUSION.match(last)):
        return None
    joined = len(numbers) > 1 and _GOES_ON.match(last, numbers[-2].end())  # "3 or 4", "5 + 13"
    return None if joined or _is_part(numbers[-1], last) else _value(numbers[-1])


def _is_aside(sentence: str) -> bool:
    """Whether a sentence speaks of the solution or to its reader, and neither computes nor concludes."""
    return bool(_ASIDE.search(sentence)) and not _results(sentence) and not _CONCLUSION.match(sentence)


def _results(text: str) -> list[Fraction]:
    """The numbers that stand alone on the right of an equals sign."""
    sides = [_leading(side) for side in _EQUALS.split(text)[1:]]
    return [side for side in sides if side is not None]


def _leading(text: str) -> Fraction | None:
    """The number that a text begins with, unless that goes on as a formula, a range or a list."""
    match = _NUMBER.search(text)
    if match is None or re.search(r"\w", text[: match.start()]) or _is_part(match, text):
        return None
    return _value(match)


def _is_part(number: re.Match[str], text: str) -> bool:
    """Whether a number of a text is a part of something else: "3\\pi", "10^3", "2x - 3", "3:45", of "(3, 4)"."""
    before, end = text[: max(number.start(), number.end("sign"))], number.end()
    if _GOES_ON.match(text, end) or _FACTOR.match(text, end) or _AFTER_FORMULA.search(before):
        return True
    return bool(_OPENED.search(before)) and not _CLOSED.match(text, end)


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
    """The formula, or the number at the beginning, of what is stated."""
    if formula := _INLINE.fullmatch(piece):
        return _formula(formula[1])
    return _answering(_plain(piece), _leading)


def _answering(text: str, read: Callable[[str], Fraction | None]) -> Fraction | None:
    """Of an equation the last side that is a number, or else the first; of any other text its number."""
    first, *others = _EQUALS.split(text)
    sides = (others[-1], first) if others else (first,)
    return next((number for side in sides if (number := read(side)) is not None), None)


def _formula(formula: str) -> Fraction | str | None:
    """A number with at most a unit beside it, or an equation that has such a side; else the expression; None for an
    empty formula. Several equations ("x = 3, y = 4") are an expression."""
    text = re.sub(rf"^{_TEXT}$", r"\1", _tidy(formula))
    text = re.sub(r"^[A-Za-z]\s*=(?!.*=)", "", text).strip()  # y = x^2 answers with x^2
    several = re.search(r",(?!\d{3})|;|\\quad|\\pm|\b(?:or|and)\b", text)
    number = _measure(text) if several else _answering(text, _measure)
    return number if number is not None else re.sub(r"\s+", "", re.sub(_TEXT, r"\1", text)) or None


def _measure(formula: str) -> Fraction | None:
    """The number that a formula is, with at most a unit beside it."""
    plain = re.sub(r"^([-−]) ", r"\1", re.sub(r"^[$€£]\s*(?=[-−])", "", _plain(formula).strip()))
    number = _NUMBER.match(plain)
    if number and not re.search(r"\d\s*\^", formula) and _UNIT.fullmatch(plain, number.end()):
        return _value(number)
    return None


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
        if letters := pattern.findall(text.strip()):
            return letters[-1]
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


def open_answer(
    answer: str,
    reference: str,
    *,
    longest: float = 4.0,
    repeated: float = 0.3,
    foreign: float = 0.2,
    overlap: float = 0.05,
) -> bool | Reason:
    """Whether an answer to an open instruction, which has no right result to compare, may be trained on, by what
    can be told of it. The limits are ours.

    Refused are, in this order: a copy of the reference (ROUGE-L of `sddx.data.written.COPIED` or more), which is no
    answer of the model's own; one of more than `longest` times the words of the reference, of which 25 count at
    least; one of whose runs of four words a share above `repeated` stood in it before; one with more than a share
    `foreign` of letters from a script that the reference does not use; and, where the reference has ten words or
    more, one whose ROUGE-L to it is below `overlap`.
    """
    alike, words = rouge_l(answer, reference), len(reference.split())
    faults = {
        "copies the reference": alike >= COPIED,
        "too long": len(answer.split()) > longest * max(words, 25),
        "repeats itself": (repetition([answer]) or 0.0) > repeated,
        "another script": _foreign(answer, reference) > foreign,
        "nothing of the reference": words >= 10 and alike < overlap,
    }
    return next((Reason(reason) for reason, holds in faults.items() if holds), True)


def _foreign(answer: str, reference: str) -> float:
    """The share of the answer's letters whose script the reference does not use; 0 where one has no letters."""
    own, written = (Counter(map(_script, filter(str.isalpha, text))) for text in (reference, answer))
    if not own or not written:
        return 0.0
    return sum(count for script, count in written.items() if script not in own) / written.total()


def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0]


def none(answer: str, reference: str) -> bool:
    """No check: every answer passes (open instructions have no final answer to compare)."""
    return True


def _plain(text: str) -> str:
    """The text with LaTeX fractions and separators written so that numbers can be found, and units without their
    exponents."""
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    text = re.sub(r"(\d)\s*\\[dt]?frac", r"\1 \\frac", text)
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    return re.sub(r"(?:(?<=[^\W\d_])|(?<=[^\W\d_]\}))\^\{?[-−]?\d+\}?", "", text)
