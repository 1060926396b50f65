"""Fetching: what a run needs of the hub, told before any download, and then downloaded once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import datasets
import httpx
import huggingface_hub
import pytest
from composing import composed
from fakehub import FakeHub, serve
from forked import command
from huggingface_hub.errors import RevisionNotFoundError
from rich.console import Console

import sddx
from sddx.commands.fetch import Wanted, fetch, tell, wanted
from sddx.config import resolve
from sddx.errors import UserError
from sddx.evaluation import task_data
from sddx.hub import notes
from sddx.models import load

CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
COMMITS = {LLAMA: FakeHub.commit(LLAMA), "openai/gsm8k": "b" * 40, "Salesforce/wikitext": "c" * 40}
MODEL = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()} | {
    "LICENSE": b"terms", "consolidated.safetensors": bytes(10**7), "original/consolidated.00.pth": bytes(10**7)
}  # fmt: skip
AUTH_CHECK = huggingface_hub.HfApi.auth_check
RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))


class Hub:
    """A hub with these data sets, and the embedded model under Llama's name; caches are empty at first. `refused`
    maps a data set to what asking for it raises; `downloads` are in order."""

    def __init__(self, folder: Path, models: FakeHub) -> None:
        self.folder, self.models = folder, models
        self.refused: dict[str, Exception] = {}
        self.downloads: list[tuple] = []

    def info(self, name: str, *, revision: str | None, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        return SimpleNamespace(
            sha=COMMITS[name], siblings=[SimpleNamespace(rfilename="data.parquet", size=2_000_000)]
        )

    def auth_check(self, api: huggingface_hub.HfApi, name: str, *, repo_type: str) -> None:
        if repo_type == "model":
            AUTH_CHECK(api, name, repo_type=repo_type)
        elif name in self.refused:
            raise self.refused[name]

    def builder(self, name: str, subset: str | None, *, revision: str) -> SimpleNamespace:
        return SimpleNamespace(
            cache_dir=str(self.folder / "datasets" / name.replace("/", "___") / str(subset) / "0.0.0" / revision)
        )

    def load_dataset(self, name: str, subset: str | None, *, split: str | None, revision: str) -> None:
        assert split is None
        self.downloads.append((name, subset))
        folder = Path(self.builder(name, subset, revision=revision).cache_dir)
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path, serve(tmp_path, monkeypatch))
    made.models.repositories[LLAMA] = MODEL
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda self, *a, **k: made.auth_check(self, *a, **k))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, *a, **k: made.info(*a, **k))
    monkeypatch.setattr(datasets, "load_dataset_builder", made.builder)
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    tasks = {"gsm8k": ("openai/gsm8k", "main")}
    monkeypatch.setattr(
        task_data, "task_datasets", lambda names, *_: [tasks[name] for name in names if name in tasks]
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    room(monkeypatch, 10**12)
    return made


def room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(free))


def configured(*overrides: str) -> dict:
    with composed("run.name=x", *overrides) as cfg:
        return resolve(cfg)


def fetched(*overrides: str) -> str:
    console = Console(width=160, record=True, quiet=True)
    with console.capture() as said:
        console.quiet = False
        fetch(wanted(configured(*overrides)), console)
    return said.get()


def test_a_run_wants_what_is_not_on_this_machine(hub: Hub, tmp_path: Path) -> None:
    """The paper's experiment: a gated model, rows that are also a task's data, texts for two purposes. What is
    local or generated is not wanted."""
    assert wanted(configured("+experiment=llama_26L")) == [
        Wanted("model", LLAMA, None, (None,), ("model",)),
        Wanted("dataset", "openai/gsm8k", None, ("main",), ("dataset", "evaluation")),
        Wanted("dataset", "Salesforce/wikitext", None, ("wikitext-2-raw-v1",), ("calibration", "text")),
    ]
    local = [f"{group}.data_files=rows.jsonl" for group in ("dataset", "calibration", "text")]
    local += ["model=tiny", "evaluation.tasks=[tiny_facts]"]
    assert wanted(configured("+experiment=llama_26L", *local)) == wanted(configured()) == []
    assert wanted(configured("teacher=some/one")) == [Wanted("model", "some/one", None, (None,), ("teacher",))]
    students = "merging.students=['seed=1','dataset=alpaca']"
    assert [each.groups for each in wanted(configured("+merging=slerp", students))] == [("merging",)]
    selection = ["pruning=shapley_task", "pruning.metric.value.tasks=[gsm8k]", "pruning.metric.value.oracle=true"]
    assert wanted(configured(*selection)) == [Wanted("dataset", "openai/gsm8k", None, ("main",), ("evaluation",))]
    compared = ["stages=[score]", "+pruning/metric@metrics.s=shapley_task", "metrics.s.value.tasks=[gsm8k]"]
    both = ["evaluation.tasks=[arc_easy]", "metrics.s.value.oracle=true"]
    assert [each.name for each in wanted(configured(*compared, *both))] == ["openai/gsm8k"]


def test_everything_is_fetched_once_and_pinned(hub: Hub) -> None:
    """The second time all is there; the printed line pins what was resolved, and a run accepts it. Where the hub
    cannot be asked, the commits are known without that line."""
    first = fetched("+experiment=llama_26L")
    everything = [("openai/gsm8k", "main"), ("Salesforce/wikitext", "wikitext-2-raw-v1")]
    files = sorted(path.name for path in hub.models.snapshot(LLAMA).iterdir())
    assert sorted(hub.models.served) == files == sorted([*(path.name for path in CHECKPOINT.iterdir()), "LICENSE"])
    assert hub.downloads == everything and first.count("downloaded") == 3
    assert "4.3 MB" in first and "2.0 MB" in first  # without the files that are never read
    again = fetched("+experiment=llama_26L")
    assert hub.downloads == everything and again.count("was here") == 3
    assert sorted(hub.models.served) == files
    pins = again.strip().splitlines()[-1].split()
    config = configured("+experiment=llama_26L", *pins)
    chosen = {"model": LLAMA, "dataset": "openai/gsm8k", "calibration": "Salesforce/wikitext"}
    chosen["text"] = "Salesforce/wikitext"
    assert {group: config[group]["revision"] for group in chosen} == {
        g: COMMITS[name] for g, name in chosen.items()
    }
    noted = json.loads(notes().read_text())
    assert noted == {f"{name}@main": COMMITS[name] for name in ("openai/gsm8k", "Salesforce/wikitext")}


def test_a_grid_fetches_each_repository_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Two data sets, of which the second needs more than is free beside the first; no pin can name both."""
    COMMITS.setdefault("tatsu-lab/alpaca", "4" * 40)
    configs = [configured("+experiment=llama_26L", f"dataset={name}") for name in ("gsm8k", "alpaca", "gsm8k")]
    asked = [wanted(config) for config in configs]
    room(monkeypatch, 13 * 10**6)
    with pytest.raises(UserError, match="16.3 MB needed"):
        tell(asked, configs)
    assert not hub.downloads
    room(monkeypatch, 10**12)
    tell(asked, configs)
    names = [name for name, *_ in hub.downloads]
    assert sorted(names) == ["Salesforce/wikitext", "openai/gsm8k", "tatsu-lab/alpaca"]
    assert hub.models.served.count("model.safetensors") == 1
    pins = capsys.readouterr().out.strip().splitlines()[-1]
    assert "dataset.revision" not in pins and f"text.revision={'c' * 40}" in pins


def test_pins_are_settings_of_a_run(hub: Hub) -> None:
    """Of what has none, as the rows on which drafts are tried, no pin is printed."""
    COMMITS.setdefault("tatsu-lab/alpaca", "4" * 40)
    given = ("+experiment=llama_26L", "+speculation=draft", "+dataset@speculation.datasets.other=alpaca")
    pins = fetched(*given).strip().splitlines()[-1].split()
    assert pins
    configured(*given, *pins)


def test_a_repository_of_many_subsets_is_asked_for_and_counted_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MMLU's data is one repository, whose size its 57 subsets share."""
    subsets = [("cais/mmlu", f"subject {number}") for number in range(57)]
    monkeypatch.setattr(task_data, "task_datasets", lambda names, *_: subsets)
    COMMITS.setdefault("cais/mmlu", "3" * 40)
    [one] = [each for each in wanted(configured()) if each.name == "cais/mmlu"]
    assert len(one.subsets) == 57
    room(monkeypatch, 5 * 10**6)  # the repository twice over, as it comes and as it is unpacked
    assert "(57 subsets)" in fetched()
    assert hub.downloads == subsets


def test_all_that_stands_in_the_way_is_told_before_any_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gated model (with and without a token), an unknown revision, a hub out of reach, and too little room."""
    hub.models.refused = {LLAMA: "gated"}
    hub.refused = {
        "openai/gsm8k": RevisionNotFoundError("no", response=RESPONSE),
        "Salesforce/wikitext": httpx.ConnectError("no"),
    }
    for token, said in ((None, "no access token"), ("hf_x", "this account has no access")):
        monkeypatch.setattr("huggingface_hub.get_token", lambda token=token: token)
        with pytest.raises(UserError) as caught:
            fetched("+experiment=llama_26L", "dataset.revision=v9")
        for part in (said, "hf auth login", "no revision 'v9'", "ConnectError", "Salesforce/wikitext"):
            assert part in str(caught.value)
    hub.refused = {"Salesforce/wikitext": hub.refused["Salesforce/wikitext"]}
    hub.models.refused = {}
    room(monkeypatch, 8 * 10**6)
    with pytest.raises(UserError) as caught:
        fetched("+experiment=llama_26L")
    for part in ("Salesforce/wikitext", "8.3 MB needed", "8.0 MB free", "HF_HOME"):
        assert part in str(caught.value)
    assert not hub.downloads and not hub.models.served


def test_what_an_interrupted_download_has_finished_is_kept_and_needs_no_room(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended while the weights came: the next call takes them, and asks for room for them and for what else had not
    come by then (files come side by side)."""
    only = ("loss=none", "model=llama31_8b_instruct")
    hub.models.breaks_at = "model.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fetched(*only)
    hub.models.served.clear()
    assert load.cached(LLAMA, None) is None
    size = len(MODEL["model.safetensors"])
    room(monkeypatch, size - 1)
    with pytest.raises(UserError, match="not enough room"):
        fetched(*only)
    room(monkeypatch, sum(map(len, MODEL.values())))
    assert "downloaded" in fetched(*only) and hub.models.served.count("model.safetensors") == 1


def test_offline_mode_is_told_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Unset it") as caught:
        fetched("+experiment=llama_26L")
    assert str(caught.value).count("HF_HUB_OFFLINE") == 1


def test_a_missing_licence_is_fetched_and_no_run_waits_for_it(hub: Hub) -> None:
    """A cache that another program filled may lack it."""
    only = ("loss=none", "model=llama31_8b_instruct")
    fetched(*only)
    licence = hub.models.snapshot(LLAMA) / "LICENSE"
    licence.resolve().unlink()
    licence.unlink()
    assert load.cached(LLAMA, None) == hub.models.snapshot(LLAMA)
    assert "downloaded" in fetched(*only) and licence.is_file() and hub.models.served.count("LICENSE") == 2


def test_a_subset_that_does_not_exist_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def builder(name: str, subset: str, *, revision: str) -> None:
        raise ValueError(f"BuilderConfig {subset!r} not found")

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    with pytest.raises(UserError, match="'mian' not found"):
        fetched("dataset=gsm8k", "dataset.subset=mian")
    assert not hub.downloads


COMMANDS = {
    "": (0, "Nothing to fetch"),
    "+sweeps=depth": (2, "Add --multirun"),
    "+experiment=llama_26L evaluation=tiny dataset=gsm8k,dolly seed=0,1 --multirun": (2, "ConnectError"),
}


@pytest.mark.parametrize("given", COMMANDS)
def test_the_command_line(given: str, tmp_path: Path) -> None:
    """The defaults need nothing; a grid names each of its repositories once; no folder and no file is left."""
    status, said = COMMANDS[given]
    if "dolly" in given:  # where the Hub is, its client reads when it is imported; nobody listens there
        env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
        asked = [sys.executable, "-m", "sddx.commands.fetch", *given.split()]
        done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, env=env, timeout=120)
    else:
        done = command("sddx.commands.fetch", *given.split(), cwd=tmp_path)
    assert done.returncode == status and said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    if "dolly" in given:
        named = done.stderr.partition("To be fetched: ")[2]
        for name in (LLAMA, "openai/gsm8k", "databricks-dolly-15k", "Salesforce/wikitext"):
            assert named.count(name) == 1
