"""Laws of the vLLM writer, with a stand-in for vLLM: the same rows, the same rules, in a process of its own.

The stand-in has vLLM's names and runs the model greedily with transformers. What vLLM itself does on a GPU is not
tried here.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from composing import SMALL, composed, resolve
from words import tiny_llama, word_tokenizer

from sddx.data.selfdata import TOO_LONG, Answer, write_answers
from sddx.engines.writing import Writer, _environment, engines
from sddx.errors import UserError
from sddx.models import load
from sddx.models.load import frozen_model, load_model
from sddx.train import run

pytestmark = pytest.mark.runs

STAND_IN = """
import os
from types import SimpleNamespace
import torch
from transformers import AutoModelForCausalLM
__version__ = "0.10.0"
print("vLLM talks on standard output")

class SamplingParams:
    def __init__(self, *, max_tokens, temperature, top_p, top_k, seed, stop_token_ids, detokenize):
        self.max_tokens, self.stop, self.given = max_tokens, stop_token_ids, (temperature, top_p, top_k, seed)
        assert temperature == 0 and top_p == 1 and top_k == -1 and detokenize is False

class LLM:
    def __init__(self, *, model, dtype, tensor_parallel_size, gpu_memory_utilization, max_model_len, seed,
                 generation_config):
        assert generation_config == "vllm"
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

    def generate(self, prompts, sampling, use_tqdm):
        print("and more")
        if os.environ.get("STAND_IN_FAILS"):
            raise RuntimeError("CUDA out of memory")
        return [self.one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling, strict=True)]

    @torch.no_grad()
    def one(self, ids, sampling):
        start, reason = len(ids), "length"
        while len(ids) < start + sampling.max_tokens:
            ids = ids + [self.model(torch.tensor([ids])).logits[0, -1].argmax().item()]
            if ids[-1] in sampling.stop:
                reason = "stop"
                break
        ids = ids[:-1] if reason == "stop" and len(ids) % 2 else ids  # with the token it stopped at, or without
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids[start:]), finish_reason=reason)])
"""
PROMPTS = ["what ?", "how many apples are there ?", "a b c d", "9", "what is 7 minus 3 plus 1 ?"]
SETTINGS = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A `vllm` that the worker can import; engines end with the test."""
    about = tmp_path / "packages" / "vllm-0.10.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.10.0\n")
    (tmp_path / "packages" / "vllm.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    yield
    engines.cache_clear()


@pytest.fixture
def talkative(tmp_path: Path) -> SimpleNamespace:
    """A random model in a folder, where a few words end an answer, so that answers differ in length."""
    tokenizer, model = word_tokenizer(), tiny_llama()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<end>", "7", "b", "is", "many"])
    model.save_pretrained(tmp_path / "model")
    return SimpleNamespace(folder=tmp_path / "model", tokenizer=tokenizer)


@pytest.mark.parametrize("engines_of_rows", [1, 2])
def test_greedy_answers_are_those_of_write_answers(
    engines_of_rows: int, stand_in: None, talkative: SimpleNamespace
) -> None:
    """Order, end tokens, cut-off answers and prompts that are too long, whoever shares the rows; twice, with the
    engines that are there."""
    prompts = [*PROMPTS[:2], "what " * 50, *PROMPTS[2:]]
    expected = write_answers(load_model(talkative.folder), talkative.tokenizer, prompts, batch_size=3, **SETTINGS)
    assert {answer.fault for answer in expected} >= {"", TOO_LONG}
    writer, done = Writer(**SETTINGS, dtype="float32", data_parallel=engines_of_rows), []
    assert writer(talkative.folder, talkative.tokenizer, prompts, done.append) == expected
    assert sum(done) == len(prompts)
    before = engines(talkative.folder, writer)
    assert writer(talkative.folder, talkative.tokenizer, prompts[:1]) == expected[:1]
    assert engines(talkative.folder, writer) is before and len(before) == engines_of_rows
    assert writer.about(talkative.folder) == {"backend": "vllm", "version": "0.10.0"}


def test_a_shorter_room_is_kept(stand_in: None, talkative: SimpleNamespace) -> None:
    writer = Writer(**SETTINGS, dtype="float32", max_model_len=14)
    assert writer(talkative.folder, talkative.tokenizer, ["a b c d"]) == [Answer("", TOO_LONG)]


def test_no_model_of_ours_and_no_engine_is_left_in_memory(stand_in: None, talkative: SimpleNamespace) -> None:
    """The frozen model goes before the engine starts; the engine's process ends when it is let go."""
    frozen_model(talkative.folder, dtype="float32", attention="sdpa", device="cpu")
    writer = Writer(**SETTINGS, dtype="float32")
    writer(talkative.folder, talkative.tokenizer, PROMPTS[:1])
    assert not load._frozen
    (engine,) = engines(talkative.folder, writer)
    process, log = engine._process, Path(engine._log.name)
    assert process.poll() is None
    del engine
    engines.cache_clear()
    gc.collect()
    assert process.poll() == 0 and not log.exists()


def test_a_failed_engine_says_why_and_is_not_used_again(
    stand_in: None, talkative: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(**SETTINGS, dtype="float32")
    monkeypatch.setenv("STAND_IN_FAILS", "1")
    with pytest.raises(UserError, match="CUDA out of memory"):
        writer(talkative.folder, talkative.tokenizer, PROMPTS)
    monkeypatch.delenv("STAND_IN_FAILS")
    assert len(writer(talkative.folder, talkative.tokenizer, PROMPTS)) == len(PROMPTS)


def test_engines_that_share_rows_see_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(**SETTINGS, dtype="float32", tensor_parallel=2, data_parallel=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [_environment(writer, place)["CUDA_VISIBLE_DEVICES"] for place in (0, 1)] == ["4,5", "6,7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [_environment(writer, place)["CUDA_VISIBLE_DEVICES"] for place in (0, 1)] == ["0,1", "2,3"]


def test_too_few_gpus_are_told(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    Writer(**SETTINGS, dtype="float32", tensor_parallel=2).require()
    with pytest.raises(UserError, match="makes 4 GPUs, and there are 2"):
        Writer(**SETTINGS, dtype="float32", tensor_parallel=2, data_parallel=2).require()


def job(out: Path, store: Path, *overrides: str) -> dict:
    short = ("trainer.budget=steps", "trainer.steps=1", "dataset.size=6", "validation=2", f"store={store}")
    with composed(*SMALL, *short, *overrides, out=out) as cfg:
        return json.loads(run(resolve(cfg), out).read_text())


def test_a_run_names_who_wrote(stand_in: None, tmp_path: Path, shared_store: Path) -> None:
    """The same greedy answers from either backend, in artifacts of their own that name backend and version; the
    engines are gone before training."""
    found = {}
    for name in ("greedy", "vllm"):
        summary = job(tmp_path / name, shared_store, "loss=sdd", f"generation={name}")
        places = [next(shared_store.glob(f"distill/*/{key}")) for key in summary["artifacts"]["distill"]]
        about = [json.loads((place / "generation.json").read_text())["backend"] for place in places]
        found[name] = (places, about, [(place / "answers.jsonl").read_text() for place in places])
    assert found["greedy"][1] == ["transformers"] * 2 and found["vllm"][1] == ["vllm"] * 2
    assert found["greedy"][2] == found["vllm"][2]
    assert not set(found["greedy"][0]) & set(found["vllm"][0])
    assert engines.cache_info().currsize == 0


@pytest.mark.skipif(shutil.which("vllm") is not None, reason="vLLM is installed here")
def test_a_missing_vllm_is_told_before_work(tmp_path: Path, shared_store: Path) -> None:
    """With the extra's name; but not where no answer is written."""
    for given, said in (
        ([], "sddx[vllm]"),
        (["generation.python=/no/python"], "/no/python"),
        ([f"generation.python={sys.executable}", "pruning.remove=13"], "12 blocks"),
    ):
        with pytest.raises(UserError) as caught:
            job(tmp_path / "out", tmp_path / "store", "loss=sdd", "generation=vllm", *given)
        assert said in str(caught.value)
        assert not list((tmp_path / "store").glob("*/*/*"))
    job(tmp_path / "out", shared_store, "loss=sft", "generation=vllm")
