"""Data sets of the hub are known by their commit, which was asked for, or noted when they were fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sddx import hub
from sddx.data.sources import from_hub, hub_texts, pinned
from sddx.errors import UserError

pytestmark = pytest.mark.fast


@pytest.fixture
def no_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caches of the hub and of `datasets` that are empty, and a hub that was not asked yet."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    for remembered in (hub.current_commit, hub.commit):
        remembered.cache_clear()
    yield
    for remembered in (hub.current_commit, hub.commit):
        remembered.cache_clear()


def answers(monkeypatch: pytest.MonkeyPatch, found: object) -> list[str]:
    """The hub gives this commit, or fails so; returns the names that it is asked for."""
    asked: list[str] = []

    def dataset_info(self: object, name: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        asked.append(name)
        if isinstance(found, Exception):
            raise found
        return SimpleNamespace(sha=found)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return asked


def refusal(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co")))


def test_a_hub_dataset_is_known_by_its_commit(no_notes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch name becomes the commit it points to, asked for once a process; a commit, and a node that is not of
    the hub, stay."""
    asked = answers(monkeypatch, "b" * 40)
    for _ in range(2):
        assert pinned({"name": "a/b", "revision": None})["revision"] == "b" * 40
    assert pinned({"name": "a/b", "revision": "c" * 40})["revision"] == "c" * 40
    assert pinned({"path": "x.jsonl"}) == {"path": "x.jsonl"}
    assert asked == ["a/b"]


OUT_OF_REACH = [
    ConnectionError("no"),
    httpx.ConnectTimeout("no"),
    OfflineModeIsEnabled("no"),
    refusal(HfHubHTTPError, 503),
]


@pytest.mark.parametrize("failure", OUT_OF_REACH, ids=lambda failure: type(failure).__name__)
def test_where_the_hub_cannot_be_asked_what_was_fetched_counts(
    failure: Exception, no_notes: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The commit noted for this very revision, with one line that says so; without one, what to do."""
    asked = answers(monkeypatch, failure)
    node = {"name": "a/b", "revision": None}
    with pytest.raises(UserError, match="sddx fetch"):
        pinned(node)
    hub.note({("a/b", None): "1" * 40, ("a/b", "v2"): "2" * 40})
    hub.note({("c/d", None): "3" * 40})
    for _ in range(2):
        assert pinned(node)["revision"] == "1" * 40
    assert pinned({**node, "revision": "main"})["revision"] == "1" * 40
    assert pinned({**node, "revision": "v2"})["revision"] == "2" * 40
    assert caplog.text.count("1" * 40) == 2 and len(asked) == 4  # once for each way to ask
    with pytest.raises(UserError, match="v3"):
        pinned({**node, "revision": "v3"})
    hub.notes().write_text("{ cut sh")
    hub.commit.cache_clear()
    with pytest.raises(UserError, match="sddx fetch"):
        pinned(node)


@pytest.mark.parametrize(
    "kind, status, said",
    [
        (RepositoryNotFoundError, 404, "the hub does not have it"),
        (RevisionNotFoundError, 404, "no revision"),
        (GatedRepoError, 403, "gated"),
        (HfHubHTTPError, 401, "does not accept the access token"),
    ],
)
def test_what_the_hub_refuses_is_not_taken_from_notes(
    kind: type[HfHubHTTPError], status: int, said: str, no_notes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.note({("a/b", None): "1" * 40})
    answers(monkeypatch, refusal(kind, status))
    with pytest.raises(UserError, match=said):
        pinned({"name": "a/b", "revision": None})


def unpack(commit: str, rows: list[dict]) -> None:
    """Rows in the cache of `datasets`, as it unpacks those of the hub."""

    class Rows(datasets.GeneratorBasedBuilder):
        BUILDER_CONFIGS = [datasets.BuilderConfig("main", version="0.0.0")]

        def _info(self) -> datasets.DatasetInfo:
            return datasets.DatasetInfo(features=datasets.Features({"q": datasets.Value("string")}))

        def _split_generators(self, _: object) -> list:
            return [datasets.SplitGenerator("train")]

        def _generate_examples(self) -> Iterator[tuple[int, dict]]:
            yield from enumerate(rows)

    made = Rows(
        cache_dir=str(datasets.config.HF_DATASETS_CACHE), dataset_name="rows", config_name="main", hash=commit,
        repo_id="Owner/Rows",
    )  # fmt: skip
    made.download_and_prepare()


def test_offline_rows_are_those_of_their_commit(no_notes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` alone gives whichever commit is newest in its cache where the hub cannot be asked. Of two that
    are there each is read by its own name, and one that is not there is refused."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for digit in "12":
        unpack(digit * 40, [{"q": f"row of {digit}"}])
    for digit in "12":
        found = hub_texts(
            name="Owner/Rows", subset="main", split="train", revision=digit * 40, column="q", size=None, seed=0
        )
        assert found == [f"row of {digit}"]
    assert datasets.load_dataset("Owner/Rows", "main", split="train", revision="3" * 40)["q"]  # no error by itself
    with pytest.raises(UserError, match=f"at commit {'3' * 40}.*gives {'2' * 40}"):
        from_hub("Owner/Rows", "main", split="train", revision="3" * 40)
