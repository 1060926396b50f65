"""Laws of continuous batching: the tokens are those of `generate`, whatever the batch, and the model is left as it
was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL_FAMILIES, VOCABULARY, WINDOW, adapt, build
from test_selfdata import GREEDY, PROMPTS, SAMPLED, talkative
from words import tiny_llama, word_tokenizer

import sddx
from sddx.compression.remove import apply_cut
from sddx.data import selfdata
from sddx.data.selfdata import end_ids, write_answers
from sddx.models import decoding
from sddx.models.anatomy import bare
from sddx.models.decoding import ContinuousBatch, greedy, is_batchable, write
from sddx.models.load import load_model, load_tokenizer
from sddx.models.outputs import run
from sddx.models.packing import packed
from sddx.records import Cut
from sddx.tiny import data

CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"
LENGTHS = (3, 30, 4, 11, 3, 19, 7, 5, 2)
NEW = 12
WINDOWED = ("mistral", "qwen3", "gemma3")


def prompts(prefix: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Prompts of very different lengths, of which all begin with the same tokens."""
    draw = torch.Generator().manual_seed(1)
    shared = torch.randint(2, VOCABULARY, (prefix,), generator=draw).tolist()
    return [[*shared, *torch.randint(2, VOCABULARY, (length,), generator=draw).tolist()] for length in lengths]


def generated(model: Any, prompt: list[int], new: int, ends: list[int]) -> list[int]:
    """What transformers writes after one prompt, alone, up to the first end token."""
    ids = torch.tensor([prompt])
    how = {"max_new_tokens": new, "do_sample": False, "eos_token_id": ends or None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()


def endings(model: Any, asked: list[list[int]], new: int) -> list[int]:
    """Tokens that the model writes at different places, so that rows end at different steps."""
    whole = [generated(model, row, new, [0]) for row in asked[:3]]
    return sorted({row[min(place, len(row) - 1)] for place, row in zip((1, 4, 7), whole, strict=True)})


def require_same(model: Any, asked: list[list[int]], new: int = NEW) -> None:
    """The tokens are those of each row alone, for every batch size."""
    assert is_batchable(model, max(map(len, asked)) + new)
    ends = endings(model, asked, new)
    expected = [generated(model, row, new, ends) for row in asked]
    assert len({len(row) for row in expected}) > 1
    for size in (1, 3, len(asked)):
        assert write(model, asked, greedy, max_new_tokens=new, batch_size=size, ends=ends) == expected


@pytest.mark.parametrize("prefix", [0, 6])
@pytest.mark.parametrize("family", sorted({*ALL_FAMILIES, "granite"} - {*WINDOWED}))
def test_tokens_are_those_of_generate(family: str, prefix: int) -> None:
    """In every family whose blocks attend to the whole text: grouped queries or not, rotary, learned or linear
    positions, experts; with and without tokens that all prompts share."""
    require_same(build(family), prompts(prefix))


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_must_hold_the_whole_text(family: str) -> None:
    """A block that forgets is none for this path; while nothing is forgotten the tokens are those of generate."""
    model = build(family)
    assert not is_batchable(model, WINDOW)
    assert is_batchable(model, WINDOW - 1)
    asked = prompts(1, (1, 3, 2))
    found = write(model, asked, greedy, max_new_tokens=3, batch_size=2, ends=[])
    assert found == [generated(model, row, 3, []) for row in asked]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "mpt"])
@pytest.mark.parametrize("lost", ["blocks", "attention", "feedforward"])
def test_pruned_models_are_written_by_alike(family: str, lost: str) -> None:
    """Without whole blocks, or without a branch of the first block and of another."""
    model, halves = build(family), {} if lost == "blocks" else {f"no_{lost}": (0, 2)}
    apply_cut(model, Cut((0, 2, 4), 5, **halves))
    require_same(model, prompts(3))


def test_adapters_and_eager_attention_are_written_by_alike() -> None:
    """A peft model, and one that is to attend by transformers' own plain products."""
    adapted = adapt(build("llama"))
    require_same(adapted, prompts(3))
    eager = build("llama")
    eager.set_attn_implementation("eager")
    require_same(eager, prompts(3))


def test_the_embedded_model_writes_as_by_generate() -> None:
    """Real prompts, in float32, rows that end by themselves."""
    model, tokenizer = load_model(CHECKPOINT), load_tokenizer(CHECKPOINT)
    examples = data.dataset(
        skill="arithmetic", shift=1.0, size=9, seed=0, check=None, rewrite="tiny", trains=[]
    ).examples
    asked = selfdata.token_ids(tokenizer, [selfdata.render(tokenizer, row.prompt) for row in examples])
    ends = end_ids(model, tokenizer)
    expected = [generated(model, row, 40, ends) for row in asked]
    for size in (1, 4, 9):
        assert write(model, asked, greedy, max_new_tokens=40, batch_size=size, ends=ends) == expected


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, SAMPLED | {"top_p": 1.0, "top_k": 0}])
def test_samples_are_those_of_generate(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same uniform numbers choose the same tokens, wherever a row stands."""
    assert is_batchable(tiny_llama(), 64)
    ours = talkative()(PROMPTS * 2, **settings)
    monkeypatch.setattr("sddx.models.decoding.is_batchable", lambda *_: False)
    assert talkative()(PROMPTS * 2, **settings) == ours


def test_rows_are_told_as_they_end() -> None:
    """Each row once, and not all at the end."""
    model, told = build("llama"), []
    asked = prompts(0)
    ends = endings(model, asked, NEW)
    write(model, asked, greedy, told.append, max_new_tokens=NEW, batch_size=3, ends=ends)
    assert sum(told) == len(asked) and len(told) > 3


def test_memory_is_moved_when_it_ends() -> None:
    """Rows that come and go for longer than there are columns have the states of each alone."""
    model = build("gpt_neox")
    batch = ContinuousBatch(model, rows=3, columns=18)
    rows = prompts(0, (9, 4))
    with torch.no_grad():
        batch.admit(rows)
        for step in range(12):
            found = batch.step([2 + step, 3 + step][: len(rows)])
            rows = [[*row, token + step] for row, token in zip(rows, (2, 3), strict=False)]
            if step == 3:
                batch.drop(0)
                rows = rows[1:]
            if step == 6:
                batch.admit(prompts(0, (12,)))
                batch.drop(1)
        whole = run(model, torch.tensor(rows), torch.ones(1, len(rows[0]), dtype=torch.long)).hidden[0, -1]
    assert torch.allclose(found[0], whole, atol=1e-4)


def state(model: Any) -> dict[str, Any]:
    """All that writing could have changed."""
    held = bare(model)
    modules = {
        name: (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in held.named_modules()
    }
    weights = {name: (weight.data_ptr(), weight.clone()) for name, weight in held.state_dict().items()}
    return {
        "modules": modules,
        "places": {name: place for name, (place, _) in weights.items()},
        "weights": {name: weight.tolist() for name, (_, weight) in weights.items()},
        "config": (held.config.to_dict(), held.config._attn_implementation),
        "generation": held.generation_config.to_dict(),
        "training": held.training,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(dtype: torch.dtype, fails: bool) -> None:
    """Weights in their place, config, hooks and forwards; also after an error in the middle."""
    model = build("llama").to(dtype)
    before, calls = state(model), []

    def pick(rows: Any, places: Any, logits: torch.Tensor) -> torch.Tensor:
        calls.append(rows)
        if fails and len(calls) > 4:
            raise RuntimeError("stop")
        return logits.argmax(-1)

    how = {"max_new_tokens": NEW, "batch_size": 3, "ends": [0]}
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            write(model, prompts(2), pick, **how)
    else:
        write(model, prompts(2), pick, **how)
    assert state(model) == before
    assert torch.is_grad_enabled()


def test_packed_weights_give_the_same_product() -> None:
    """To rounding, for any number of rows, with a bias and without; afterwards the layers are plain again."""
    model = build("opt").to(torch.bfloat16)
    ids = torch.tensor(prompts(0, (20, 20)))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with packed(model):
            found = model(input_ids=ids).logits
        assert (found - plain).norm() < 0.02 * plain.norm()
        assert torch.equal(model(input_ids=ids).logits, plain)


def test_what_does_not_hold_is_written_by_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does not read positions as they are given is found out, and its answers are generate's."""
    tokenizer, model = word_tokenizer(), tiny_llama()
    expected = write_answers(model, tokenizer, PROMPTS, **GREEDY)
    monkeypatch.setattr(decoding.ContinuousBatch, "_mask", lambda *_: None)
    assert not is_batchable(model, 40)
    assert write_answers(model, tokenizer, PROMPTS, **GREEDY) == expected
