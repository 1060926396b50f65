"""Laws of removed branches: what is left is the block without that branch, in every family, also with a cache."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from families import ALL_FAMILIES, EAGER, VOCABULARY, adapt, build, tokens
from torch import nn

from sddx.compression.compressed import compress
from sddx.compression.remove import Removal, apply_cut
from sddx.compression.soundness import cache_bytes, prove
from sddx.errors import UserError
from sddx.models.anatomy import blocks, branches, family, part
from sddx.records import Batch, Cut, Units
from sddx.students.student import load_student, save_student
from sddx.students.teacher import SeparateTeacher, SharedTeacher
from sddx.training.objective import layer_pairs

pytestmark = pytest.mark.fast

# The first block's attention is gone, which transformers would take the sequence length from.
CUT = Cut((0, 1, 3, 4), 5, no_attention=(0, 3), no_feedforward=(1,))


def silenced(model, cut):
    """Independent reference: the same model with the branches' last linear layers at zero."""
    model = deepcopy(model)
    out = {"gpt_neox": "attention.dense", "opt": "self_attn.out_proj", "mpt": "attn.out_proj"}
    attention = out.get(model.config.model_type, "self_attn.o_proj")
    for kind, numbers in (("attention", cut.no_attention), ("feedforward", cut.no_feedforward)):
        for number in numbers:
            block = blocks(model)[number]
            experts = getattr(part(block, "mlp"), "experts", None)
            if kind == "feedforward" and experts is not None:
                nn.init.zeros_(experts.down_proj)
                continue
            linear = part(block, attention if kind == "attention" else family(model).last_linear)
            nn.init.zeros_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
    apply_cut(model, Cut(cut.kept, cut.total))
    return model


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_a_branch_that_is_gone_is_one_that_writes_nothing(name):
    model, ids = build(name), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = silenced(model, CUT)(ids, attention_mask=mask).logits
    apply_cut(model, CUT)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_what_is_left_is_sound_and_comes_back_from_disk(name, tmp_path):
    """Cached = uncached though the first cache layer is empty; bit-equal after saving and loading."""
    build(name).save_pretrained(tmp_path / "base")
    how = {"done": [Removal(CUT)], "base": "key", "attention": "eager" if name in EAGER else "sdpa"}
    made = load_student(tmp_path / "base", None, **how)
    student = made.model.requires_grad_(True)

    def again():
        save_student(made, tmp_path / "student", base="key")
        return load_student(tmp_path / "base", tmp_path / "student", **how).model

    proof = prove(student, vocabulary=VOCABULARY, again=again)
    assert proof["blocks"] == 4 and proof["reload_equal"] and proof["cached_tokens_equal"]
    assert proof["gradients_reach"] == len(list(student.parameters()))


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_generation_with_a_cache_is_generation_without(name):
    """Greedy and with beams, which rearrange the cache; past the sliding window."""
    model, ids = build(name), tokens(2, 11)
    apply_cut(model, CUT)
    for beams in (1, 2):
        made = [
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                do_sample=False,
                num_beams=beams,
                use_cache=cached,
            )
            for cached in (True, False)
        ]
        assert torch.equal(*made)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_the_cache_is_smaller_by_what_was_removed(name):
    """Two of five attention branches gone, and one block: 2 / 5 of the bytes are left."""
    model = build(name)
    before = cache_bytes(model)
    apply_cut(model, CUT)
    assert cache_bytes(model) * 5 == before * 2


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_the_shared_teacher_has_all_its_branches(name):
    """Bit for bit, while the student lacks some and has an adapter."""
    model = build(name)
    separate = SeparateTeacher(deepcopy(model))
    ids = tokens()
    batch = Batch(ids, torch.ones_like(ids), ids)
    made = compress(model, [Removal(CUT)])
    student = made.model = adapt(model)
    before = student(ids).logits
    ours, theirs = SharedTeacher(made)(batch, states=True), separate(batch, states=True)
    assert torch.equal(ours.hidden, theirs.hidden) and len(ours.states) == 5
    assert torch.equal(student(ids).logits, before)


def test_parameters_of_the_branch_and_its_norm_are_gone():
    model = build("llama")
    block = blocks(model)[0]
    attention = (
        sum(weight.numel() for weight in block.self_attn.parameters()) + block.input_layernorm.weight.numel()
    )
    whole = sum(weight.numel() for weight in model.parameters())
    apply_cut(model, Cut(tuple(range(5)), 5, no_attention=(0,)))
    assert sum(weight.numel() for weight in model.parameters()) == whole - attention


def test_names_units_and_cuts():
    """What a cut is called, and how units of each granularity become one."""
    assert Cut.without({1}, 4).name == "3L"
    assert Cut(tuple(range(32)), 32, tuple(range(6)), tuple(range(8, 12))).name == "32L-6A4F"
    both = Units("sublayers", 4)
    assert len(both) == 8 and both.names[:3] == ["attention 0", "feedforward 0", "attention 1"]
    # Units 2 and 3 are the two halves of block 1: together they are the block.
    assert both.cut({0, 2, 3, 7}) == Cut((0, 2, 3), 4, no_attention=(0,), no_feedforward=(3,))
    assert Units("attention", 4).cut({3}) == Cut((0, 1, 2, 3), 4, no_attention=(3,))
    assert Units("blocks", 4).cut({3}) == Cut.without({3}, 4)
    with pytest.raises(UserError, match="pruning.units='heads'"):
        Units("heads", 4)


@pytest.mark.parametrize(
    "wrong", [{"no_attention": (2,)}, {"no_attention": (1, 0)}, {"no_attention": (0,), "no_feedforward": (0,)}]
)
def test_cuts_that_contradict_themselves_are_refused(wrong):
    with pytest.raises(ValueError):
        Cut((0, 1), 3, **wrong)


def test_a_cut_comes_back_from_disk(tmp_path):
    CUT.save(tmp_path / "cut.json")
    assert Cut.load(tmp_path / "cut.json") == CUT


def test_blocks_that_lost_a_branch_are_held_to_their_own_teacher_block():
    assert layer_pairs(CUT, "own") == [(0, 0), (1, 1), (2, 3), (3, 4)]


def test_a_family_that_norms_after_the_sum_is_refused_with_the_reason():
    """OPT-350m."""
    model = build("opt")
    model.config.do_layer_norm_before = False
    with pytest.raises(UserError, match="after the residual sum"):
        blocks(model)


def test_a_block_without_the_named_parts_is_refused():
    model = build("llama")
    del blocks(model)[2].input_layernorm
    with pytest.raises(UserError, match="attention branch of a LlamaForCausalLM cannot be told"):
        branches(model)
