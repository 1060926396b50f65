"""The recipe of the embedded model: it reads all of its corpus once, and its optimiser does what it says."""

from __future__ import annotations

import hashlib

import pytest
import torch

from sddx.tiny.corpus import documents
from sddx.tiny.pretrain import Corpus, Row, collate, new_model, orthogonal, rate_at
from sddx.tiny.vocabulary import build_tokenizer

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_document_is_read_once_and_hashed_in_order(tokenizer) -> None:
    """No step drops or repeats a row, whatever the pool; the digest is that of the plain text."""
    corpus = Corpus(tokenizer, total=500, pool=200, tokens=400, seed=0)
    read = sorted(tuple(row.ids) for step in corpus for part in step for row in part)
    texts = [given + answered for given, answered in documents("pretrain", 500)]
    assert read == sorted(tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    assert corpus.digest.hexdigest() == hashlib.sha256("".join(f"{text}\n" for text in texts).encode()).hexdigest()


def test_micro_batches_keep_within_their_tokens(tokenizer) -> None:
    for step in Corpus(tokenizer, total=300, pool=300, tokens=400, seed=0):
        assert 1 <= len(step) <= 3
        assert all(len(part) * max(len(row.ids) for row in part) <= 400 or len(part) == 1 for part in step)


def test_weights_stand_on_targets() -> None:
    """A target of the prompt weighs as told, one of the answer 1, padding nothing."""
    ids, targets, weights = collate([Row([5, 6, 7, 8], 2), Row([5, 9], 1)], 0.1)
    assert targets.tolist() == [[6, 7, 8], [9, 0, 0]] and ids[0].tolist() == [5, 6, 7]
    assert weights[0].tolist() == pytest.approx([0.1, 1.0, 1.0]) and weights[1].tolist() == [1.0, 0.0, 0.0]


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
