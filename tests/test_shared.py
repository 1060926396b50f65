"""What many cells of a grid share is found out once, and nothing else is taken over from another cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from composing import composed, resolve

from sddx import train
from sddx.config.shared import once, once_as_read, sharing
from sddx.data import check as data_check
from sddx.errors import UserError, mistakes_of
from sddx.stages.cost import estimated

RATES = [
    [f"trainer.learning_rate={rate}", f"loss={loss}"] for rate in (1e-3, 2e-3, 4e-3) for loss in ("sft", "sdd")
]


def settings(*given: str) -> dict[str, Any]:
    with composed(*given) as cfg:
        return resolve(cfg)


def test_the_same_is_found_out_once_while_it_is_shared_and_anew_otherwise() -> None:
    asked: list[int] = []

    def find() -> int:
        asked.append(1)
        return len(asked)

    assert [once(["a", 1], find), once(["a", 1], find)] == [1, 2]
    with sharing():
        assert [once(["a", 1], find), once(["a", 1], find)] == [3, 3]
        with sharing():
            assert once(["a", 1], find) == 3
        assert [once(["a", 1], find), once(["a", True], find), once(["a", 1.0], find)] == [3, 4, 5]
    with sharing():
        assert once(["a", 1], find) == 6


def test_what_is_raised_is_not_kept() -> None:
    answers = iter([UserError("no"), "yes"])

    def find() -> str:
        if isinstance(answer := next(answers), UserError):
            raise answer
        return answer

    with sharing():
        with pytest.raises(UserError):
            once("a", find)
        assert once("a", find) == "yes"


def test_a_question_is_asked_again_where_something_that_it_looked_at_differs() -> None:
    asked: list[Mapping[str, Any]] = []

    def sharded(settings: Mapping[str, Any]) -> str:
        asked.append(settings)
        return f"{settings['model']} on {settings['devices'] if settings.get('shards') else 1}"

    def ask(**settings: Any) -> tuple[str, int]:
        return once_as_read("sharded", settings, sharded), len(asked)

    with sharing():
        assert ask(model="a", shards=False, devices=1) == ("a on 1", 1)
        assert ask(model="a", shards=False, devices=2) == ("a on 1", 1)  # devices were not looked at
        assert ask(model="a", shards=True, devices=2) == ("a on 2", 2)
        assert ask(model="a", shards=True, devices=4) == ("a on 4", 3)
        assert ask(model="b", shards=True, devices=4) == ("b on 4", 4)
        assert ask(model="a", devices=4) == ("a on 1", 5)  # what is not there is not what is false
        assert ask(model="a", shards=True, devices=2, seed=1) == ("a on 2", 5)
    assert ask(model="a", shards=False, devices=1) == ("a on 1", 6)


def test_who_looks_at_all_names_looks_at_all_settings() -> None:
    with sharing():
        assert once_as_read("all", {"a": 1}, lambda settings: dict(settings.items())) == {"a": 1}
        assert once_as_read("all", {"a": 2}, lambda settings: dict(settings.items())) == {"a": 2}


def test_cells_that_differ_in_their_rates_share_what_no_rate_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows are made once, and looked at in the model's tokens once an arm, at whatever rates."""
    asked: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (asked.append(name), function(*given))[1]

    for name in ("build", "require_trainable"):
        monkeypatch.setattr(data_check, name, counted(name, getattr(data_check, name)))
    with sharing():
        for cell in RATES:
            train.verify(settings(*cell))
    assert asked.count("require_trainable") == 2
    assert asked.count("build") == 3  # the rows, the texts for scoring and those that are held out


WRONG = [
    ["evaluation.tasks=[tiny_arithmetic,tiny_no]", "trainer.learning_rate=0.01"],
    ["evaluation.tasks=[tiny_arithmetic,tiny_no]", "trainer.learning_rate=0.02"],
    ["pruning.remove=12"],
    ["pruning.remove=12", "loss=none"],
    ["trainer.keep=best", "validation=0"],
    ["trainer.keep=best", "validation=8", "trainer.validate_every=1"],
    ["max_length=1"],
    ["tuning.targets=[no]"],
    ["dataset.size=0", "seed=-1"],
]


def test_every_cell_is_told_its_own_mistakes() -> None:
    """The same, whichever cells were checked before it."""
    cells = [settings(*cell) for cell in [*RATES[:2], *WRONG]]

    def mistakes() -> list[list[str]]:
        return [mistakes_of([lambda cell=cell: train.verify(cell)]) for cell in cells]

    alone = mistakes()
    with sharing():
        assert mistakes() == alone
    assert sum(map(bool, alone)) >= 6


def test_a_plan_says_the_same_whichever_cells_were_planned_before() -> None:
    more = [["pruning.remove=2"], ["tuning.rank=4"], ["tuning=full"], ["dataset.size=64"], ["pruning/patch=linear"]]
    cells = [settings(*cell) for cell in [*RATES[:3], *more]]

    def planned() -> list[Any]:
        made = [estimated(cell) for cell in cells]
        return [(each.parts(), each.trained, each.adapter, each.disk()) for each in made]

    alone = planned()
    with sharing():
        assert planned() == alone
