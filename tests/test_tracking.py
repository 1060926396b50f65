"""Laws of the trackers: what W&B would refuse is told before any work, and what it can take is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb

from sddx import tracking
from sddx.errors import UserError
from sddx.report import workspace

NODE = {
    "_target_": "sddx.tracking.track", "_partial_": True, "project": "sddx", "entity": None, "group": None,
    "tags": [], "mode": "offline",
}  # fmt: skip


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What W&B finds of a login: `found`, or the error that it raises; and how often it was asked."""
    state: dict = {"found": False, "asked": 0}

    def answer(**given: object) -> bool:
        assert given == {"prompt": False, "verify": False}  # nobody sits there to answer
        state["asked"] += 1
        if isinstance(state["found"], Exception):
            raise state["found"]
        return state["found"]

    monkeypatch.setattr(wandb, "login", answer)
    tracking._no_login.cache_clear()
    yield state
    tracking._no_login.cache_clear()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"project": "a b:c?"}, "cannot contain"),
        ({"project": "x" * 200}, "exceeded 128"),
        ({"tags": [""]}, "Tag at index 0 is empty"),
        ({"tags": ["x" * 70]}, "70 characters"),
    ],
)
def test_what_wandb_refuses_is_told_before_work(given: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tracking.require(NODE | given)
    tracking.require(NODE | given | {"mode": "disabled"})
    tracking.require(NODE | given | {"_target_": "mine.tracker"})  # of which nothing is known


def test_online_needs_a_login_and_asks_once(login: dict) -> None:
    tracking.require(NODE)
    assert login["asked"] == 0
    for _ in range(2):  # each cell of a sweep
        with pytest.raises(UserError, match="no login here.*wandb.mode=offline needs none"):
            tracking.require(NODE | {"mode": "online"})
    assert login["asked"] == 1


def test_a_login_that_is_none_is_told_and_one_that_is_there_will_do(login: dict) -> None:
    login["found"] = wandb.errors.AuthenticationError("API key must have 40+ characters.")
    with pytest.raises(UserError, match="40. characters. Run"):
        tracking.require(NODE | {"mode": "online"})
    tracking._no_login.cache_clear()
    login["found"] = True
    tracking.require(NODE | {"mode": "online"})


def test_tags_may_be_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict = {}
    monkeypatch.setattr(tracking, "_start", lambda **settings: given.update(settings))
    tracking.require(NODE | {"tags": [1, 2.5, "a"]})
    settings = {key: value for key, value in NODE.items() if not key.startswith("_")} | {"tags": [1, 2.5, "a"]}
    with tracking.track(tmp_path, "id", "name", {}, **settings):
        pass
    assert given["tags"] == ["1", "2.5", "a"]


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--entity", "a/b"], "--entity 'a/b'"), (["--entity", "me", "--project", ""], "--project ''")],
)
def test_the_dashboard_is_refused_in_a_sentence(given: list[str], said: str, login: dict, capsys) -> None:
    assert workspace.main(given) == 2 and said in capsys.readouterr().err
    assert workspace.main(["--entity", "me"]) == 2 and "no login here" in capsys.readouterr().err
