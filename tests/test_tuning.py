"""Laws of tuning: an adapter is on what its targets name, and on nothing else; what cannot be is told before."""

from __future__ import annotations

import pytest
import torch
from families import VOCABULARY, build, tokens
from transformers import CONFIG_MAPPING

from sddx.compression.compressed import compress
from sddx.compression.remove import Removal
from sddx.errors import UserError
from sddx.models.anatomy import blocks
from sddx.models.narrow import built, narrow
from sddx.records import Batch, Cut
from sddx.students.student import load_student, save_student
from sddx.students.teacher import SharedTeacher
from sddx.training.tuning import adapted_weights, coverage, full, kind, lora, require_adapter

pytestmark = pytest.mark.fast

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
DENSE = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
FUSED = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
CUT = Cut.without({1}, 4)
# Experts with a dense block beside them, with shared experts, with neither; and no experts at all.
KINDS = {
    "qwen3_moe": ({"mlp_only_layers": [2]}, ATTENTION | FUSED | DENSE, {"mlp.gate"}),
    "qwen2_moe": (
        {},
        ATTENTION | FUSED | {each.replace("mlp", "mlp.shared_expert") for each in DENSE},
        {"mlp.gate", "mlp.shared_expert_gate"},
    ),
    "glm4_moe": (
        {"first_k_dense_replace": 1},
        ATTENTION | FUSED | DENSE | {each.replace("mlp", "mlp.shared_experts") for each in DENSE},
        {"mlp.gate"},
    ),
    "llama4_text": (
        {},
        ATTENTION
        | {each.replace("mlp", "feed_forward") for each in FUSED}
        | {each.replace("mlp", "feed_forward.shared_expert") for each in DENSE},
        {"feed_forward.router"},
    ),
    "mixtral": ({}, ATTENTION | FUSED, {"mlp.gate"}),
    "qwen3": ({}, ATTENTION | DENSE, set()),
}


def model_of(name, **settings):
    config = CONFIG_MAPPING[name](num_hidden_layers=4, **KINDS[name][0])
    small = narrow(config, width=32, vocabulary=VOCABULARY, tie_word_embeddings=False, **settings)
    return built(small, torch.float32, attn_implementation="eager").requires_grad_(False)


def shaken(student):
    """The adapter with random matrices: B starts at 0 and changes nothing, and now it does."""
    torch.manual_seed(0)
    bare = student.eval()(input_ids=tokens()).logits
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "lora_" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    assert not torch.allclose(student(input_ids=tokens()).logits, bare, atol=1e-2)
    return student


@pytest.mark.parametrize("name", KINDS)
def test_all_linear_is_every_linear_map_but_routers_and_head(name):
    """In every block, told in words; gradients reach each adapter."""
    _, adapted, routers = KINDS[name]
    model = model_of(name)
    maps = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and kind(n) in adapted]
    student = shaken(lora(model, 0, rank=2, alpha=4)).train()
    found, left = coverage(student)
    assert set(found) == adapted and {"lm_head", "model.embed_tokens", *routers} <= set(left)
    assert all(each in adapted_weights(student) for each in (*found, *left))
    names = [n for n, _ in student.named_parameters() if "lora_A" in n]
    assert all(any(f".{each}." in n for n in names) for each in maps)
    student(input_ids=tokens()).logits.log_softmax(-1)[..., 0].sum().backward()
    trained = {n: w for n, w in student.named_parameters() if w.requires_grad}
    assert {n.count("lora_") for n in trained} == {1}
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in trained.values())


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe", "llama4_text"])
def test_an_adapter_beside_experts_comes_back_and_can_be_switched_off(name, tmp_path):
    """From disk bit for bit, onto its own blocks; off, the whole model is the teacher."""
    model_of(name).save_pretrained(tmp_path / "base")
    how = {"done": [Removal(CUT)], "base": "key", "attention": "eager"}
    loaded = load_student(tmp_path / "base", None, **how)
    whole = load_student(tmp_path / "base", None, **how | {"done": [Removal(Cut.without(set(), 4))]}).model
    student = loaded.model = shaken(lora(loaded.model, 0, rank=2))
    logits = student(input_ids=tokens()).logits
    save_student(loaded, tmp_path / "student", base="key")
    again = load_student(tmp_path / "base", tmp_path / "student", **how).model
    assert torch.equal(again(input_ids=tokens()).logits, logits)
    batch = Batch(tokens(), torch.ones_like(tokens()), tokens())
    outputs = SharedTeacher(loaded)(batch)
    expected = whole(input_ids=tokens(), attention_mask=batch.attention_mask).logits
    assert torch.equal(outputs.head(outputs.hidden), expected)
    assert torch.equal(student(input_ids=tokens()).logits, logits)


def test_named_targets_beside_experts_are_the_layers_of_that_name():
    """Not the experts that were once stored under it; experts have their own names."""
    assert set(coverage(lora(model_of("qwen3_moe"), 0, targets=["gate_proj", "q_proj"]))[0]) == {
        "mlp.gate_proj",
        "self_attn.q_proj",
    }
    assert set(coverage(lora(model_of("qwen3_moe"), 0, targets=["gate_up_proj"]))[0]) == {
        "mlp.experts.gate_up_proj"
    }
    assert set(coverage(lora(model_of("qwen3_moe"), 0, targets=["experts.down_proj"]))[0]) == {
        "mlp.experts.down_proj"
    }


def test_full_tuning_is_told_as_such():
    assert adapted_weights(full(build("llama"), 0)) == "All weights are trained."


WRONG = {
    "lm_head has the weights of model.embed_tokens": {"targets": ["q_proj", "lm_head"]},
    "no linear layer is named 'embed_tokens'": {"targets": ["embed_tokens"]},
    "no linear layer is named 'nope'": {"targets": "nope"},
    "targets is empty": {"targets": []},
    "rank=33 is more than .* can use: 32": {"rank": 33},
    "rank=1000000000000000000000000000000 is more": {"rank": 10**30},
    "drops everything": {"dropout": 1.0},
}


@pytest.mark.parametrize("said", WRONG)
def test_an_adapter_that_cannot_be_is_told(said):
    """Of a model whose head is its embeddings."""
    model = build("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with pytest.raises(UserError, match=said) as error:
        lora(model, 0, **WRONG[said])
    assert len(error.value.args) == 1
    require_adapter(model, rank=32, dropout=0.5)


def test_all_that_is_wrong_with_an_adapter_is_told_at_once():
    with pytest.raises(UserError) as error:
        require_adapter(build("llama"), rank=1000, dropout=1, targets=["q_proj", "nope"])
    assert len(error.value.args) == 3


def test_an_untied_head_can_be_adapted(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    made = compress(model, [Removal(Cut.without({1}, 5))])
    student = made.model = shaken(lora(model, 0, targets=["q_proj", "lm_head"]))
    assert set(coverage(student)[0]) == {"self_attn.q_proj", "lm_head"}
    save_student(made, tmp_path / "student", base="key")
    again = load_student(tmp_path / "base", tmp_path / "student", done=made.done, base="key").model
    assert torch.equal(again(tokens()).logits, student(tokens()).logits) and len(blocks(again)) == 4


def test_dropout_beside_experts_is_refused_with_what_can_be_had():
    with pytest.raises(UserError, match=r"dropout=0.1 .* fused experts.*q_proj"):
        lora(model_of("mixtral"), 0, dropout=0.1)
    lora(model_of("mixtral"), 0, dropout=0.1, targets=["q_proj"])
