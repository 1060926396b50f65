"""Laws of the benchmark: the same work for both models, in pairs, and nothing but the clock decides a speed."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from composing import SMALL, composed, resolve
from families import VOCABULARY, build
from rich.console import Console
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING

from sddx.commands import bench
from sddx.compression.soundness import cache_bytes
from sddx.errors import UserError
from sddx.models.anatomy import blocks
from sddx.models.narrow import built, smallest
from sddx.train import run

pytestmark = pytest.mark.runs


def slow(depth: int, log: list | None = None, name: str = "") -> object:
    """A random model whose blocks take five milliseconds each, which is most of its time."""
    model = build("llama", blocks=depth)
    for block in blocks(model):
        block.register_forward_hook(lambda *given: time.sleep(0.005))
    if log is not None:
        model.register_forward_hook(lambda *given: log.append(name))
    return model


def test_half_the_blocks_are_twice_as_fast() -> None:
    """Reading, writing and the first token, where a block's time is known; counts and bytes are exact."""
    found = bench.race(lambda: slow(8), lambda: slow(4), batch=2, context=16, new=5, repeats=3)
    for what in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        assert 1.7 < found["ratios"][what]["median"] < 2.3
        assert found["ratios"][what]["low"] <= found["ratios"][what]["median"] <= found["ratios"][what]["high"]
    assert 0.4 < found["ratios"]["seconds_to_first_token"]["median"] < 0.6
    for name, depth in (("unpruned", 8), ("pruned", 4)):
        model = build("llama", blocks=depth)
        assert found[name]["parameters"] == sum(weight.numel() for weight in model.parameters())
        assert found[name]["parameter_bytes"] == 4 * found[name]["parameters"]
        # The last token is written and not read.
        assert found[name]["cache_bytes"] == 2 * (16 + 5 - 1) * cache_bytes(model)


def test_all_that_a_hybrid_model_remembers_counts() -> None:
    """Of layers without keys and values what they keep instead, too."""
    model = built(smallest(CONFIG_MAPPING["qwen3_next"](num_hidden_layers=4)), torch.float32).eval()
    ids = torch.ones(2, 8, dtype=torch.long)
    with torch.no_grad():
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    held = [each for each in tree_leaves([vars(layer) for layer in layers]) if isinstance(each, torch.Tensor)]
    assert bench.measure(model, ids[:, :6], 3)["cache_bytes"] == sum(tensor.nbytes for tensor in held)


def test_speeds_are_tokens_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a clock that goes on by two seconds whenever it is asked."""
    ticks = itertools.count(0, 2)
    monkeypatch.setattr(bench, "_now", lambda device: next(ticks))
    found = bench.measure(build("llama"), torch.randint(VOCABULARY, (3, 10)), 5)
    assert found["prefill_tokens_per_second"] == 3 * 10 / 2
    assert found["decode_tokens_per_second"] == 3 * 4 / 2
    assert found["seconds_to_first_token"] == 4


def test_pairs_alternate_after_an_untimed_pass() -> None:
    log: list[str] = []
    bench.race(lambda: slow(1, log, "a"), lambda: slow(1, log, "b"), context=4, new=2, repeats=3)
    passes = [name for name, _ in zip(log[::2], log[1::2], strict=True)]
    assert "".join(passes) == "ab" + "ab" + "ba" + "ab"


def test_a_context_that_does_not_fit_is_cut_and_said(capsys: pytest.CaptureFixture) -> None:
    found = bench.race(lambda: build("llama"), lambda: build("llama"), context=1000, new=8, repeats=1)
    assert (found["context"], found["asked_context"]) == (120, 1000)
    bench.show(found, Console(width=100))
    printed = capsys.readouterr().out
    assert "asked: 1000" in printed and "no speed" in printed
    for new, said in ((128, "128 positions"), (1, "Give 2 or more")):
        with pytest.raises(UserError, match=said):
            bench.race(lambda: build("llama"), lambda: build("llama"), new=new)


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory, shared_store: Path) -> Path:
    out = tmp_path_factory.mktemp("run")
    given = (*SMALL, "loss=sft", "trainer.budget=steps", "trainer.steps=2", f"store={shared_store}")
    with composed(*given, out=out) as cfg:
        return run(resolve(cfg), out)


def test_a_runs_models_are_measured_beside_its_summary(summary: Path, capsys: pytest.CaptureFixture) -> None:
    given = [f"run={summary}", "context=16", "new=4", "repeats=1", "device=cpu"]
    assert bench.main(given) == 0
    found, fields = json.loads((summary.parent / "bench.json").read_text()), json.loads(summary.read_text())
    assert found["depth"] == "9L" and found["device"] == "cpu" and found["dtype"] == "float32"
    for name in bench.MODELS:
        assert found[name]["parameters"] == fields["parameters"][name]
    assert "What pruning buys" in capsys.readouterr().out
    assert not list(summary.parent.glob(".bench*"))


def test_where_the_numbers_cannot_be_kept_none_is_measured(
    summary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(folder: Path, setting: str) -> None:
        assert folder == summary.parent
        raise UserError(f"{folder} cannot be written")

    monkeypatch.setattr(bench, "writable_folder", refuse)
    monkeypatch.setattr(bench, "race", lambda *given, **work: pytest.fail("measured"))
    assert bench.main([f"run={summary}"]) == 2 and "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("full"), RuntimeError("can't allocate memory")]
)
def test_models_that_memory_does_not_hold_are_told(error: Exception) -> None:
    def make() -> None:
        raise error

    with pytest.raises(UserError, match="memory has no room"):
        bench.race(make, make)
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        bench.race(make, make)


def test_mistakes_are_told(summary: Path, capsys: pytest.CaptureFixture) -> None:
    for given, said in (
        ([f"run={summary}", "batch=many"], "batch=many"),
        ([f"run={summary}", "tokens=3"], "tokens is not a setting"),
        (["run=/no/where"], "/no/where"),
        ([f"run={summary}", "device=tpu"], "tpu"),
        ([f"run={summary}", "dtype=int4"], "int4"),
    ):
        assert bench.main(given) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and said in message
