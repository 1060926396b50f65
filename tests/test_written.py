"""What the unpruned model wrote: how it is judged without a right result, measured, and controlled for."""

from __future__ import annotations

import random
from functools import cache

import pytest

from sddx.data.checkers import open_answer
from sddx.data.selfdata import CUT_OFF, REASONS, Answer, SelfData, acceptance, judge, strangers
from sddx.data.written import measured, rouge_l
from sddx.errors import UserError
from sddx.records import Example, Rewrite

pytestmark = pytest.mark.fast

REFERENCE = "Rain falls when water in the clouds becomes too heavy and drops to the ground below them."


def longest_common(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """By its definition, without a table."""

    @cache
    def of(i: int, j: int) -> int:
        if i == len(first) or j == len(second):
            return 0
        return 1 + of(i + 1, j + 1) if first[i] == second[j] else max(of(i + 1, j), of(i, j + 1))

    return of(0, 0)


def test_rouge_l_is_what_its_definition_says() -> None:
    draw = random.Random(0)
    for _ in range(50):
        answer, reference = (tuple(draw.choices("abcde", k=draw.randint(1, 12))) for _ in range(2))
        common = longest_common(answer, reference)
        precision, recall = common / len(answer), common / len(reference)
        right = 2 * precision * recall / (precision + recall) if common else 0.0
        assert rouge_l(" ".join(answer), " ".join(reference)) == pytest.approx(right, abs=1e-12)
    assert rouge_l("Ein Größenwahn!", "ein größenwahn") == 1 and rouge_l("東京", "東京") == 1


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("Clouds hold water. When they become too heavy, it drops to the ground as rain.", ""),
        (REFERENCE.upper(), "copies the reference"),
        ("Water in the clouds falls. " + " ".join(f"word{n}" for n in range(200)), "too long"),
        ("Water in the clouds falls. " * 4, "repeats itself"),
        ("Вода в облаках становится слишком тяжёлой и падает на землю.", "another script"),
        ("Paris, Lyon, Nice", "nothing of the reference"),
    ],
)
def test_an_open_answer_is_refused_for_what_can_be_told_of_it(answer: str, reason: str) -> None:
    assert open_answer(answer, REFERENCE) == (reason or True)


def test_a_short_reference_binds_neither_length_nor_words() -> None:
    assert open_answer("The capital of France is Paris, a city on the Seine.", "Paris") is True
    assert open_answer("42", "9") is True


def test_a_checkers_own_reasons_are_kept_and_counted() -> None:
    example = Example("a", "Why does it rain?", REFERENCE, "reference")
    answers = [Answer(REFERENCE), Answer("x", CUT_OFF), Answer("Clouds hold water that falls when heavy.")]
    rewrites = judge([example] * 3, answers, check=open_answer)
    assert [rewrite.reason for rewrite in rewrites] == ["copies the reference", CUT_OFF, ""]
    counts = acceptance(rewrites)
    assert (counts["accepted"], counts["copies the reference"], counts[CUT_OFF]) == (1, 1, 1)
    assert set(REASONS) < set(counts) and sum(counts.values()) == 3 + 3
    assert len(SelfData("drop", "open", "right")(rewrites)) == 1
    assert [row.origin for row in SelfData("reference")(rewrites)] == ["reference", "reference", "self"]


def test_what_was_written_is_measured_by_hand() -> None:
    rows = [
        Rewrite("1", "p", "a b c d", "a b c d", "copies the reference"),
        Rewrite("2", "p", "a b c d", "a x c", ""),
        Rewrite("3", "p", "a b", "a", CUT_OFF),
        Rewrite("4", "p", "a b", "", "empty"),
    ]
    found = measured(rows, CUT_OFF)
    assert (found["rows"], found["accepted"], found["cut_off"], found["copied"]) == (4, 0.25, 0.25, 1 / 3)
    assert found["rouge_l"] == pytest.approx((1 + 4 / 7 + 2 / 3) / 3)
    assert found["words"] == {"reference": 10 / 3, "self": 8 / 3}
    assert measured([], CUT_OFF)["accepted"] is None and measured(rows[3:], CUT_OFF)["rouge_l"] is None


def test_nobody_is_shown_his_own_reference() -> None:
    rows = [Example(str(n), f"p{n}", f"r{n}", "reference") for n in range(9)]
    shown = strangers(rows, seed=0)
    assert sorted(shown) == sorted(row.response for row in rows)
    assert all(answer != row.response for answer, row in zip(shown, rows, strict=True))
    assert shown == strangers(rows, seed=0) != strangers(rows, seed=1)
    with pytest.raises(UserError, match="selfdata.reference=wrong"):
        strangers(rows[:1], seed=0)
