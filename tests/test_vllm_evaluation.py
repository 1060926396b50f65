"""Laws of evaluation by vLLM: lm-eval's own VLLM class around a stand-in engine, in a process of its own, gives the
scores of the HF backend item by item, and the two are never compared.

The stand-in has vLLM's names and runs the model with transformers. What vLLM itself does on a GPU is not tried
here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import tomllib
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from composing import SMALL, composed, resolve
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import sddx
from sddx.commands.export import main as export
from sddx.engines.judging import Engine
from sddx.engines.settings import OLDEST
from sddx.errors import UserError
from sddx.evaluation.right_answers import MEASURES
from sddx.models import load
from sddx.models.load import frozen_model
from sddx.report.paired import compare, load_samples
from sddx.store import manifest
from sddx.train import run

pytestmark = pytest.mark.runs

ENGINE = """
import os, time
from types import SimpleNamespace
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
print("vLLM talks on standard output")

class SamplingParams:
    def __init__(self, *, max_tokens, temperature, stop=(), **rest):
        self.max_tokens, self.stop, self.scoring = max_tokens, stop, "prompt_logprobs" in rest
        assert temperature == 0

def TokensPrompt(prompt_token_ids):
    return prompt_token_ids

class LLM:
    def __init__(self, *, model, dtype, max_model_len, enable_lora, max_lora_rank, **rest):
        if os.environ.get("STAND_IN") == "fails":
            raise RuntimeError("CUDA out of memory")
        if os.environ.get("STAND_IN") == "waits":
            print("here is", os.getpid(), flush=True)
            time.sleep(300)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.room = max_lora_rank if enable_lora else 0
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        context = max_model_len or self.model.config.max_position_embeddings
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=context))

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm, lora_request):
        if lora_request and not isinstance(self.model, PeftModel):
            self.model = PeftModel.from_pretrained(self.model, lora_request.path).eval()
            assert self.model.peft_config["default"].r <= self.room and self.room in (8, 16)
        pairs = zip(prompts, sampling_params, strict=True)
        return [self.scored(ids) if each.scoring else self.written(ids, each) for ids, each in pairs]

    def scored(self, ids):
        steps = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        rows = [{ids[t + 1]: float(steps[t, ids[t + 1]]), int(steps[t].argmax()): float(steps[t].max())}
                for t in range(len(ids) - 1)]
        return SimpleNamespace(prompt_logprobs=[None, *rows])

    def written(self, ids, sampling):
        start, text = len(ids), ""
        while len(ids) < start + sampling.max_tokens:
            ids = ids + [self.model(torch.tensor([ids])).logits[0, -1].argmax().item()]
            text = self.tokenizer.decode(ids[start:], skip_special_tokens=False)
            if found := [text.index(stop) for stop in sampling.stop if stop in text]:
                text = text[: min(found)]
                break
        return SimpleNamespace(outputs=[SimpleNamespace(text=text)])
"""
FILES = {
    "vllm/__init__.py": ENGINE,
    "vllm/lora/__init__.py": "",
    "vllm/lora/request.py": "class LoRARequest:\n"
    "    def __init__(self, name, number, path):\n        self.path = path\n",
    "vllm/tokenizers.py": "from transformers import AutoTokenizer\n"
    "def get_tokenizer(name, tokenizer_mode, trust_remote_code, revision):\n"
    "    return AutoTokenizer.from_pretrained(name)\n",
    "vllm/entrypoints/chat_utils.py": "def resolve_hf_chat_template(tokenizer, **given):\n"
    "    return tokenizer.chat_template\n",
    "vllm-0.10.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.10.0\n",
}
CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"
MODELS = ("unpruned", "pruned", "recovered")
VLLM = "evaluation.backend=vllm"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `vllm` that a worker can import."""
    folder = tmp_path_factory.mktemp("packages")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def stand_in(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(packages))


def job(out: Path, store: Path, *overrides: str) -> Path:
    short = ("trainer.budget=steps", "trainer.steps=4", "trainer.batch_size=4", f"store={store}", "loss=sft")
    with composed(*SMALL, *short, *overrides, out=out) as cfg:
        return run(resolve(cfg), out)


@pytest.fixture(scope="module")
def runs(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same run judged by Hugging Face, by vLLM, and by vLLM with the adapter apart; in one store, in a template
    that hangs on its settings."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(CHECKPOINT, folder / "model")
    template = folder / "model" / "chat_template.jinja"
    template.write_text("{% if enable_thinking is false %}{{ date_string }}{% endif %}" + template.read_text())
    model = ("model=local", f"model.path={folder / 'model'}", "model.dtype=float32")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(packages))
        backends = {"hf": (), "vllm": (VLLM,), "apart": (VLLM, "evaluation.vllm.adapter=apart")}
        done = {name: job(folder / name, folder / "store", *model, *given) for name, given in backends.items()}
    return SimpleNamespace(**done, store=folder / "store")


def results(runs: SimpleNamespace, backend: str, model: str) -> dict:
    key = json.loads(getattr(runs, backend).read_text())["artifacts"][f"evaluate_{model}"]
    return json.loads((manifest.find(runs.store, "evaluate", key) / "results.json").read_text())


@pytest.mark.parametrize("backend", ["vllm", "apart"])
@pytest.mark.parametrize("model", MODELS)
def test_scores_are_those_of_hf_item_by_item(model: str, backend: str, runs: SimpleNamespace) -> None:
    """Prompts, answers and choices alike; log-probabilities to rounding, which batches and merged adapters move;
    and what is measured on text is measured by the same model."""
    by_hf, by_vllm = (results(runs, each, model) for each in ("hf", backend))
    assert by_hf["tasks"].keys() == by_vllm["tasks"].keys()
    for task, record in by_hf["tasks"].items():
        for a, b in zip(record["samples"], by_vllm["tasks"][task]["samples"], strict=True):
            expected, found = a.pop("likelihoods"), b.pop("likelihoods")
            assert found == (pytest.approx(expected, abs=1e-3) if expected else None)
            for measure in MEASURES:  # which are made of them
                expected, found = a.pop(measure), b.pop(measure)
                assert found == (None if expected is None else pytest.approx(expected, abs=1e-3))
            assert a == b
    assert by_hf["text"] == by_vllm["text"]
    assert by_vllm["backend"] == {"name": "vllm", "version": "0.10.0"} and by_hf["backend"]["name"] == "hf"


def test_the_three_models_are_told_apart(runs: SimpleNamespace) -> None:
    """Each was judged from weights of its own: no two give the same likelihoods."""
    found = [results(runs, "vllm", model)["tasks"]["tiny_facts"]["samples"] for model in MODELS]
    seen = [[sample["likelihoods"] for sample in samples] for samples in found]
    assert seen[0] != seen[1] and seen[1] != seen[2] and seen[0] != seen[2]


def test_the_student_is_shared_and_no_weights_are_left(runs: SimpleNamespace) -> None:
    """The backend changes the evaluations alone; the merged folders are gone."""
    by_hf, by_vllm = (json.loads(getattr(runs, name).read_text())["artifacts"] for name in ("hf", "vllm"))
    assert by_hf["train"] == by_vllm["train"]
    assert all(by_hf[f"evaluate_{model}"] != by_vllm[f"evaluate_{model}"] for model in MODELS)
    assert not list(runs.store.glob("evaluate/**/*.safetensors"))


def test_an_adapter_apart_has_a_rank_that_vllm_makes_room_for(tmp_path: Path) -> None:
    for rank, room in ((1, 8), (8, 8), (9, 16), (300, 320)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
        assert Engine()._model(tmp_path, tmp_path, "bfloat16")["max_lora_rank"] == room


def test_the_backends_are_never_compared(runs: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    samples = [load_samples(getattr(runs, name).parent, "recovered") for name in ("hf", "vllm")]
    with pytest.raises(UserError, match="backend is hf and vllm"):
        compare(*samples)
    assert export([f"run={runs.vllm}", f"to={runs.store / 'to'}", "check=eval"]) == 2
    assert "vLLM did it" in capsys.readouterr().err and not (runs.store / "to").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["pruning.units=attention"], "Removed branches"),
        (["pruning/patch=linear"], "modules of their own"),
        (["evaluation.backend=vlm"], "evaluation.backend='vlm' must be hf or vllm"),
        (["evaluation.vllm.python=/no/python"], "/no/python cannot be run"),
        (["evaluation.vllm.adapter=apart", "tuning=full"], "adapter=apart is for an adapter, and this tuning has"),
        (["evaluation.vllm.adapter=apart", "tuning.rank=513"], "ranks up to 512, and tuning.rank=513"),
        (["evaluation.vllm.tensor_parallel=4"], "makes 4 GPUs, and there are 2"),
    ],
)
def test_refused_before_work(
    given: list[str], said: str, stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=said):
        job(tmp_path / "out", tmp_path / "store", "pruning=block_influence", VLLM, *given)
    assert not list((tmp_path / "store").glob("*/*/*"))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_a_missing_vllm_is_told_before_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot import vllm.*sddx\[vllm\].*evaluation.backend=hf"):
        job(tmp_path / "out", tmp_path / "store", VLLM)
    assert not list((tmp_path / "store").glob("*/*/*"))


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("vllm", "0.9.2", f"has vLLM 0.9.2, and {OLDEST} or newer is needed.*evaluation.backend=hf"),
        ("lm_eval", "0.4.1", f"has lm-eval 0.4.1, and sddx runs with {metadata.version('lm_eval')}"),
    ],
)
def test_versions_that_will_not_do_are_told(
    name: str, version: str, said: str, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else the interpreter has: these come first on its path."""
    (tmp_path / f"{name}-{version}.dist-info").mkdir()
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (tmp_path / f"{name}-{version}.dist-info/METADATA").write_text(about)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{packages}")
    with pytest.raises(UserError, match=said):
        Engine().require()


def test_the_oldest_vllm_is_that_of_the_extra() -> None:
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert Requirement(extras["optional-dependencies"]["vllm"][0]).specifier == SpecifierSet(f">={OLDEST}")


def test_a_worker_that_fails_says_why(stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's mistake that the harness finds comes through as itself, all else with the end of the log."""
    with composed(*SMALL) as cfg:
        config = resolve(cfg)
    folder, evaluation = Path(config["model"]["path"]), {**config["evaluation"], "backend": "vllm"}
    frozen_model(folder, dtype="float32", attention="sdpa", device="cpu")
    judge = partial(Engine().judge, folder, dtype="float32", answered=tmp_path / "answered")
    with pytest.raises(UserError, match="asks for up to 4000 new tokens"):
        judge(evaluation={**evaluation, "max_new_tokens": 4000})
    assert not load._frozen  # before the engine starts
    monkeypatch.setenv("STAND_IN", "fails")
    with pytest.raises(UserError, match="CUDA out of memory"):
        judge(evaluation=evaluation)


def test_what_the_worker_says_is_shown(stand_in: None, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The half-width to expect, before the progress bars; nothing of it where it is to be quiet. And what was
    answered in an earlier attempt is not asked again."""
    with composed(*SMALL, VLLM) as cfg:
        config = resolve(cfg)
    settings = {"evaluation": config["evaluation"], "dtype": "float32"}
    judge = partial(Engine().judge, Path(config["model"]["path"]), **settings)
    for quiet in (True, False):
        answered = tmp_path / str(quiet)
        results = judge(answered=answered, quiet=quiet)
        said = capfd.readouterr().err
        assert ("95 % interval" in said, "requests" in said) == (not quiet, not quiet)
    again = judge(answered=answered, quiet=False)
    assert again == results and "requests" not in capfd.readouterr().err


def test_a_worker_does_not_outlive_the_run(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed leaves no process behind on the GPU."""
    monkeypatch.setenv("STAND_IN", "waits")
    given = "Path(), evaluation={}, dtype='', answered=Path(), quiet=False"
    work = f"from sddx.engines.judging import Engine, Path; Engine().judge({given})"
    with subprocess.Popen([sys.executable, "-c", work], stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None
        pid = next(int(line.split()[-1]) for line in parent.stderr if line.startswith("here is"))
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
