"""Models of the hub: which of their files come, what their keys rest on, what is said where they do not come."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from fakehub import FakeHub, serve
from huggingface_hub import constants

import sddx
from sddx.errors import UserError
from sddx.models.load import FILES, RUNS, decides, fetched, load_tokenizer, locate
from sddx.store import Store, digest

pytestmark = pytest.mark.fast

CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"
MODEL = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()} | {"LICENSE": b"terms"}
COMMON = {"README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
SPECIAL = {"special_tokens_map.json"}


def shards(count: int, form: str = "model-{:05}-of-{:05}.safetensors") -> set[str]:
    return {form.format(number, count) for number in range(1, count + 1)} | {"model.safetensors.index.json"}


# What these repositories hold: what is read or belongs to the licence, and the rest.
REPOSITORIES = {
    "meta-llama/Llama-3.1-8B-Instruct": (
        COMMON | SPECIAL | shards(4) | {"LICENSE", "USE_POLICY.md"},
        {"original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"},
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        COMMON | SPECIAL | shards(3) | {"tokenizer.model"},
        {"consolidated.safetensors", "params.json", "tokenizer.model.v3"},
    ),
    "Qwen/Qwen3-8B": (COMMON | shards(5) | {"LICENSE", "merges.txt", "vocab.json"}, set()),
    "meta-llama/Llama-2-7b-hf": (
        COMMON | SPECIAL | shards(2) | {"LICENSE.txt", "USE_POLICY.md", "tokenizer.model"},
        {"pytorch_model.bin.index.json", *(f"pytorch_model-0000{part}-of-00002.bin" for part in (1, 2))},
    ),
    "of many forms": (
        COMMON | {"model.safetensors", "chat_template.jinja", "added_tokens.json", "NOTICE", "vocab.txt"},
        {"onnx/model.onnx", "onnx/config.json", "model.Q4.gguf", "tf_model.h5", "flax_model.msgpack", "figure.png",
         "modeling_own.py", "requirements.txt", "original/model.safetensors"},
    ),
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = serve(tmp_path, monkeypatch)
    hub.repositories["org/model"] = dict(MODEL)
    return hub


@pytest.mark.parametrize("name", REPOSITORIES)
def test_what_is_read_comes_with_its_licence_and_nothing_else(name: str) -> None:
    """16 GB of Llama's and 14.5 GB of Mistral's weights lie there a second time."""
    wanted, rest = REPOSITORIES[name]
    assert {file for file in wanted | rest | {".gitattributes"} if fetched(file)} == wanted
    terms = {file for file in wanted if file.startswith(("README", "LICENSE", "NOTICE", "USE_POLICY"))}
    assert {file for file in wanted if decides(file)} == wanted - terms
    assert set(RUNS) < set(FILES)


def key(tmp_path: Path, folder: Path) -> str:
    return Store(tmp_path / "store").source("model", folder, decides).key


def test_a_models_key_rests_on_what_decides_its_numbers(tmp_path: Path) -> None:
    folder = shutil.copytree(CHECKPOINT, tmp_path / "model")
    first = key(tmp_path, folder)
    for name in ("README.md", "LICENSE", "USE_POLICY.md", ".gitattributes", "consolidated.safetensors", "a.gguf"):
        (folder / name).write_text("another")
        assert key(tmp_path, folder) == first, name
    seen = {first}
    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b" ")
        seen.add(key(tmp_path, folder))
        (folder / name).write_bytes(before)
    (folder / "added_tokens.json").write_text("{}")
    assert len(seen | {key(tmp_path, folder)}) == 7


def test_a_snapshot_and_its_copy_have_one_key(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large weights are known by the name that the cache gives to their content, so they are not read for it; what
    is small can be edited in place, and is read."""
    snapshot, commit = locate("org/model")
    assert commit == hub.commit("org/model") and snapshot == hub.snapshot("org/model")
    expected = key(tmp_path, CHECKPOINT)
    monkeypatch.setattr(digest, "SMALL", len(MODEL["model.safetensors"]))
    os.chmod(snapshot / "model.safetensors", 0o200)  # a superuser reads it all the same, so it is also emptied
    os.truncate(snapshot / "model.safetensors", 0)
    os.truncate(snapshot / "model.safetensors", len(MODEL["model.safetensors"]))
    assert key(tmp_path, snapshot) == expected
    (snapshot / "tokenizer.json").write_bytes(MODEL["tokenizer.json"] + b" ")
    assert key(tmp_path, snapshot) != expected


def test_without_a_network_the_cache_is_enough(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE, and with a hub that is down; also where another program left out the licence. What
    lacks a part of the model is refused."""
    locate("org/model")
    hub.served.clear()
    hub.refused["org/model"] = "down"
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert locate("org/model")[0] == locate("org/model", revision=hub.commit("org/model"))[0]
        assert locate("org/model", revision="main")[1] == hub.commit("org/model")
    snapshot = hub.snapshot("org/model")
    (snapshot / "LICENSE").unlink()
    assert load_tokenizer(locate("org/model")[0])
    (snapshot / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="IncompleteSnapshotError"):
        locate("org/model")
    assert not hub.served


OBSTACLES = {
    "gated": "Accept its licence at https://huggingface.co/org/model",
    "token": "does not accept the access token",
    "gone": "was not found",
    "down": "no route to the hub",
    "offline": "HF_HUB_OFFLINE is set",
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_keeps_a_model_away_is_named(obstacle: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", obstacle == "offline")
    hub.refused["org/model"] = obstacle
    with pytest.raises(UserError, match=OBSTACLES[obstacle]):
        locate("org/model")
    assert not hub.served


def test_a_full_disk_is_not_a_missing_model(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(UserError, match="No space left.*HF_HOME") as caught:
        locate("org/model")
    assert "was not found" not in str(caught.value)
