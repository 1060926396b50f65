"""The recipe of the embedded model: it reads all of its corpus once, and its optimiser does what it says."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from sddx.config import CONF, resolve
from sddx.errors import UserError
from sddx.models.load import load_model
from sddx.tiny.corpus import documents
from sddx.tiny.pretrain import (
    Corpus,
    Row,
    backward,
    new_model,
    orthogonal,
    pack,
    pretrain,
    rate_at,
    require_positions,
)
from sddx.tiny.recipe import recipe
from sddx.tiny.vocabulary import build_tokenizer

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_document_is_read_once_in_order_and_hashed(tokenizer) -> None:
    """No step drops or repeats a document; the digest is that of the plain text."""
    corpus = Corpus(tokenizer, total=600, tokens=400, seed=0)
    read = [row.ids for step in corpus for row in step]
    texts = [given + answered for given, answered in documents("pretrain", 600)]
    assert read == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert corpus.digest.hexdigest() == hashlib.sha256("".join(f"{text}\n" for text in texts).encode()).hexdigest()


def test_a_step_ends_with_the_document_that_fills_it(tokenizer) -> None:
    *steps, _ = Corpus(tokenizer, total=300, tokens=400, seed=0)
    sizes = [[len(row.ids) for row in step] for step in steps]
    assert all(sum(size) >= 400 > sum(size[:-1]) for size in sizes)


def test_weights_stand_on_targets() -> None:
    """A target of the answer weighs one over the root of the answer's length, one of the prompt a share of
    that, padding nothing."""
    packed = pack([Row([5, 6, 7, 8, 9, 10], 2), Row([5, 9], 1)], 0.1)
    assert packed.shapes == [(2, 5)] and packed.positions.tolist() == [0, 1, 2, 3, 4] * 2
    assert packed.targets.view(2, 5).tolist() == [[9, 0, 0, 0, 0], [6, 7, 8, 9, 10]]
    assert packed.weights.tolist() == pytest.approx([1, 0, 0, 0, 0, 0.05, 0.5, 0.5, 0.5, 0.5])


def test_documents_in_a_packed_step_do_not_see_each_other(tokenizer) -> None:
    """Loss and gradients equal those of every document alone, with transformers' own attention, in float64."""
    model = new_model(tokenizer, SHAPE, 0).double()
    alone = deepcopy(model)
    alone.set_attn_implementation("eager")
    step = next(iter(Corpus(tokenizer, total=50, tokens=400, seed=0)))
    loss, total = backward(model, pack(step, 0.1), torch.float64), 0.0
    weight = sum(pack([row], 0.1).weights.sum() for row in step)
    for row in step:
        ids, one = torch.tensor([row.ids]), pack([row], 0.1)
        losses = torch.nn.functional.cross_entropy(alone(ids[:, :-1]).logits[0], one.targets, reduction="none")
        share = (losses * one.weights).sum() / weight
        share.backward()
        total += share.item()
    assert loss == pytest.approx(total, rel=1e-5)  # rotary angles are float32
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 8, 8)])
def test_orthogonal_pushes_singular_values_towards_one(shape: tuple[int, ...]) -> None:
    """Muon's coefficients bring every singular value that is not tiny to between 0.6 and 1.25."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, after = torch.linalg.svdvals(matrices), torch.linalg.svdvals(orthogonal(matrices))
    assert (before.amax(-1) / before.amin(-1)).min() > 1.5
    assert after.min() > 0.6 and after.max() < 1.25


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [rate_at(progress, warmup=0.1, decay=0.5) for progress in (0.05, 0.1, 0.3, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_a_new_model_is_a_function_of_the_seed(tokenizer) -> None:
    first, again, other = (new_model(tokenizer, SHAPE, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def configured(out: Path, *given: str) -> dict:
    """The settings of a recipe of seconds."""
    small = [f"out={out}", "documents=40", "evaluation.tasks=[tiny_facts,tiny_myths]", "evaluation.limit=8"]
    more = [f"threads={torch.get_num_threads()}", "model.num_hidden_layers=2", *given]
    with initialize_config_dir(str(CONF), version_base=None):
        return resolve(compose("pretrain", overrides=[*small, *more]))


def test_the_recipe_makes_a_model_with_its_card(tmp_path) -> None:
    """Settings, documents, steps, evaluation, card; and what is there already is not overwritten."""
    out = tmp_path / "model"
    config = configured(out)
    pretrain(recipe(config))
    stated = dict(line[2:].split(": ") for line in (out / "README.md").read_text().splitlines() if line[:2] == "- ")
    facts, myths = float(stated["tiny_facts"]), float(stated["tiny_myths"])
    assert float(stated["average"]) == pytest.approx((facts + myths) / 2, abs=0.11)
    assert stated["documents"] == "40" and load_model(out).config.num_hidden_layers == 2
    with pytest.raises(UserError, match="exists already"):
        recipe(config)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["documents=abc", "precision=float8", "seed=null"],
            ["documents='abc'", "precision='float8'", "seed=null"],
        ),
        (["threads=-1", "decay=0", "tokens_per_step=0"], ["threads=-1", "decay=0", "tokens_per_step=0"]),
        (
            ["prompt_weight=-1", "decay=2", "evaluation.tasks=[tiny_fact]"],
            ["prompt_weight", "decay=2", "tiny_facts"],
        ),
        (["model.hidden_size=127"], ["hidden_size=127 is no even multiple"]),
        (["model.num_hidden_layers=0"], ["num_hidden_layers=0 must be above 0"]),
        (["seed=-1"], ["seed=-1 must be a whole number"]),
        (["model.num_attention_heads=3"], ["num_attention_heads=3 is no multiple of num_key_value_heads=2"]),
        (["~out"], ["out has no value"]),
    ],
)
def test_all_that_is_wrong_with_a_recipe_is_told_before_work(tmp_path, given: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        recipe(configured(tmp_path / "model", *given))
    assert all(part in str(caught.value) for part in said)


def test_a_folder_that_cannot_be_written_is_told_with_the_rest(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        recipe(configured(tmp_path / "file" / "model", "threads=abc"))
    assert "cannot be written" in str(caught.value) and "threads='abc'" in str(caught.value)


def test_documents_must_fit_the_positions(tokenizer) -> None:
    corpus = Corpus(tokenizer, total=40, tokens=400, seed=0)
    longest = max(len(row.ids) for row in corpus.rows())
    require_positions(corpus, longest)
    with pytest.raises(UserError, match=f"documents have {longest} tokens"):
        require_positions(corpus, longest - 1)
    read = list(Corpus(tokenizer, total=40, tokens=400, seed=0).rows())
    assert [row for step in corpus for row in step] == read  # looking read nothing away
