"""Laws of surgery: what is left after a cut is a model like any other, and each rule cuts where it says."""

from __future__ import annotations

import re
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from families import ALL_FAMILIES, CLASSES, FAMILIES, VOCABULARY, adapt, build, tokens

from sddx.compression.choose import contiguous, last, lowest, random, ranked
from sddx.compression.remove import apply_cut
from sddx.compression.soundness import UnsoundModel, prove
from sddx.errors import UserError
from sddx.models.anatomy import blocks, per_layer_lists
from sddx.models.load import load_model
from sddx.records import Cut

pytestmark = pytest.mark.fast

CUT = Cut.without({1, 2}, 5)


def proven(model, reload=True):
    """The proof, with transformers' own way of saving and loading."""

    def again():
        dtype = str(model.dtype).removeprefix("torch.")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return load_model(Path(folder), dtype=dtype, attention=model.config._attn_implementation)

    return prove(model, vocabulary=VOCABULARY, again=again if reload else None)


def fresh_model(model, cut):
    """Independent reference: a new model of the new depth, its weights the old ones under new names."""
    config = deepcopy(model.config)
    if getattr(config, "layer_types", None):
        config.layer_types = [model.config.layer_types[block] for block in cut.kept]
    config.num_hidden_layers = len(cut.kept)
    weights = {}
    for name, weight in model.state_dict().items():
        block = re.search(r"layers\.(\d+)\.", name)
        if block and int(block[1]) in cut.removed:
            continue
        new = block and f"layers.{cut.kept.index(int(block[1]))}."
        weights[name.replace(block[0], new) if block else name] = weight
    reference = type(model)(config)
    reference.load_state_dict(weights, strict=True)
    return reference.eval()


@pytest.mark.parametrize("family", [f for f in ALL_FAMILIES if f not in ("mpt", "qwen3_moe", "mixtral")])
@pytest.mark.parametrize("removed", [{1, 2}, {4}, {0, 2}])
def test_pruned_logits_equal_a_fresh_model_of_the_new_depth(family, removed):
    """Slicing the module list and renaming the state dict give the same model, exactly."""
    model, cut, ids = build(family), Cut.without(removed, 5), tokens()
    reference = fresh_model(model, cut)
    before = model(ids).logits
    apply_cut(model, cut)
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_cached_generation_equals_uncached(family):
    """Also past the sliding window, and with the blocks that make the first cache layer gone."""
    model = build(family)
    apply_cut(model, Cut.without({0, 3}, 5))
    ids = tokens(2, 11)
    made = [
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=cached
        )
        for cached in (True, False)
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_pruned_model_is_sound(family):
    """Depth, indices, per-layer lists, cache and a round trip through a folder."""
    model = build(family)
    apply_cut(model, CUT)
    proof = proven(model)
    assert proof["blocks"] == 3 and proof["reload_equal"] and proof["head_equals_model"]
    assert proof["cached_tokens_equal"] and 0 < proof["cached_difference"] < 1e-4
    assert "layer_types" in proof["per_layer_lists"] or family not in ("qwen3", "gemma3")
    assert proof["gradients_reach"] == len(list(model.parameters()))
    indices = [{m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")} for block in blocks(model)]
    assert indices == [{0}, {1}, {2}]


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_sound_too(family, tmp_path):
    """The tolerance of the cache check follows the dtype; the round trip stays exact."""
    build(family).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="bfloat16")
    apply_cut(model, CUT)
    assert proven(model)["reload_equal"]


def test_proof_finds_a_model_cast_after_loading():
    """`model.to(bfloat16)` rounds the rotary frequencies too; a model loaded in bfloat16 keeps them whole."""
    model = build("llama").to(torch.bfloat16)
    with pytest.raises(UnsoundModel, match="reloaded model gives other logits"):
        proven(model)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_keeping_all_is_the_identity(family):
    """Bit for bit, in logits and in config."""
    model, ids = build(family), tokens()
    before, config = model(ids).logits, model.config.to_dict()
    apply_cut(model, Cut.without(set(), 5))
    assert torch.equal(model(ids).logits, before) and model.config.to_dict() == config


@pytest.mark.parametrize("family", FAMILIES)
def test_per_layer_lists_follow_the_kept_blocks(family):
    """The entry of a kept block stays its own, and the full lists come back with the full stack."""
    model = build(family)
    lists = per_layer_lists(model.config)
    full = apply_cut(model, Cut.without({0, 2}, 5))
    assert full.settings == lists and len(full.blocks) == 5
    for name, values in lists.items():
        assert getattr(model.config, name) == [values[1], values[3], values[4]]


def test_lists_of_tokens_are_no_per_layer_lists():
    """Five end tokens in a model of five blocks are not cut with the blocks."""
    model = build("llama")
    model.config.eos_token_id = [1, 2, 3, 4, 5]
    apply_cut(model, CUT)
    assert model.config.eos_token_id == [1, 2, 3, 4, 5]


def test_two_models_of_one_config_object_do_not_share_a_cut():
    """Cutting one leaves the other whole."""
    config = build("gemma3").config
    first, second = CLASSES["gemma3"](config), CLASSES["gemma3"](config).eval()
    before = second(tokens()).logits
    apply_cut(first, CUT)
    assert second.config.num_hidden_layers == 5 and torch.equal(second(tokens()).logits, before)


def test_cut_of_another_depth_is_refused():
    """Both depths are named."""
    with pytest.raises(UserError, match="12 blocks, and this one has 5"):
        apply_cut(build("llama"), Cut.without({1}, 12))


def test_adapter_before_surgery_is_refused():
    """An adapter is put into kept blocks only, which holds because it comes second."""
    with pytest.raises(ValueError, match="peft afterwards"):
        apply_cut(adapt(build("llama")), CUT)


def test_proof_finds_a_forgotten_depth():
    """With the old depth in its config a saved model comes back with fresh blocks."""
    model = build("llama")
    apply_cut(model, CUT)
    model.config.num_hidden_layers = 5
    with pytest.raises(UnsoundModel, match="num_hidden_layers is 5 and there are 3"):
        proven(model)


def test_proof_finds_a_forgotten_index():
    """With old indices training passes and the first cached forward fails."""
    model = build("llama")
    apply_cut(model, CUT)
    blocks(model)[1].self_attn.layer_idx = 3
    with pytest.raises(UnsoundModel, match=r"block 1 carries layer_idx \[3\]"):
        proven(model)


def test_proof_finds_an_uncut_list():
    """With per-layer lists left alone all works until the model is saved."""
    model = build("qwen3")
    kinds = list(model.config.layer_types)
    apply_cut(model, CUT)
    model.config.layer_types = kinds
    with pytest.raises(UnsoundModel, match="layer_types has not one entry"):
        proven(model)


def test_proof_finds_a_cache_layer_that_two_blocks_share():
    """A wrong index need not raise by itself; here the proof turns the library's error into its own."""
    model = build("llama")
    attention = blocks(model)[1].self_attn
    attention.register_forward_pre_hook(lambda *_: setattr(attention, "layer_idx", 0))
    attention.register_forward_hook(lambda *_: setattr(attention, "layer_idx", 1))
    with pytest.raises(UnsoundModel, match="decoding with the cache fails"):
        proven(model, reload=False)


def test_proof_finds_logits_that_differ_with_the_cache():
    """A block that behaves otherwise when it is given one token at a time."""
    model = build("llama")
    attention = blocks(model)[1].self_attn
    attention.register_forward_hook(lambda module, args, out: (out[0] * (1 + (out[0].shape[1] == 1)), out[1]))
    with pytest.raises(UnsoundModel, match="cached and uncached logits differ"):
        proven(model, reload=False)


def test_half_precision_that_blows_rounding_up_is_told_from_a_fault():
    """Attention that all but chooses one token turns rounding into other logits, in bfloat16 alone: a sound model.
    One that is wrong with the cache is refused in either."""
    model = build("llama")
    with torch.no_grad():
        for block in blocks(model):
            block.self_attn.q_proj.weight.mul_(30)
    model.to(torch.bfloat16)
    proof = proven(model, reload=False)
    assert proof["rounding_told_in"] == "float32" and proof["cached_difference"] < 1e-3
    blocks(model)[1].self_attn.register_forward_hook(
        lambda module, args, out: (out[0] * (1 + (out[0].shape[1] == 1)), out[1])
    )
    with pytest.raises(UnsoundModel, match="cached and uncached logits differ"):
        proven(model, reload=False)


def test_proof_finds_a_head_of_another_kind():
    """A family that scales its logits in a way that `run` does not know must not pass unnoticed."""
    model = build("llama")
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits * 2))
    with pytest.raises(UnsoundModel, match="body and head"):
        proven(model, reload=False)


# Cosine block influence on OpenWebText, as published with the code of arXiv 2407.16286 (rounded to five digits).
PUBLISHED = {
    "Llama-2-7B": (
        "0.40655 0.24990 0.14538 0.14624 0.15152 0.15010 0.14364 0.14199 0.13387 0.12874 0.12481 0.11314 0.10922 "
        "0.11000 0.10580 0.10590 0.10622 0.08393 0.07560 0.06369 0.06161 0.04661 0.04402 0.03651 0.03473 0.03079 "
        "0.03321 0.02987 0.03320 0.03373 0.06029 0.30719",
        "27,25,28,26,29,24,23,22,21,30,20,19,18,17,14,15,16,12,13,11,10,9,8,7,6,2,3,5,4,1,31,0",
    ),
    "Mistral-7B-v0.1": (
        "0.41315 0.22294 0.18502 0.15421 0.15791 0.16194 0.15580 0.15514 0.14192 0.13151 0.12525 0.11694 0.11012 "
        "0.10614 0.11162 0.11074 0.10947 0.10528 0.10620 0.09696 0.07502 0.06127 0.04937 0.04654 0.04156 0.03952 "
        "0.03852 0.04080 0.05036 0.06017 0.06129 0.17413",
        "26,25,27,24,23,22,28,29,21,30,20,19,17,13,18,16,12,15,14,11,10,9,8,3,7,6,4,5,31,2,1,0",
    ),
}


@pytest.mark.parametrize("remove", [0, 1, 6, 31])
@pytest.mark.parametrize("model", PUBLISHED)
def test_lowest_follows_a_published_order(model, remove):
    """Known answer: the order of the published influences, late middle first, both ends last (docs/sources.md)."""
    influence, order = PUBLISHED[model]
    values, expected = [float(value) for value in influence.split()], [int(block) for block in order.split(",")]
    assert ranked(values) == expected
    assert lowest({"mean": values}, 32, remove) == tuple(sorted(expected[:remove]))


def test_lowest_takes_the_earlier_block_of_equals():
    assert lowest({"mean": [0.5, 0.1, 0.1, 0.1]}, 4, 2) == (1, 2)


def distances(total, cheap):
    """Distance 0.9 everywhere but where a run of blocks is said to be cheap."""
    matrix = [[0.9] * (total + 1) for _ in range(total + 1)]
    for (start, stop), value in cheap.items():
        matrix[start][stop] = value
    return {"mean": matrix}


def test_contiguous_takes_the_smallest_distance_of_the_wanted_size():
    """Other sizes do not count, nor does the lower triangle; the first and the last run are candidates."""
    scores = distances(6, {(1, 3): 0.2, (3, 5): 0.1, (2, 3): 0.0, (5, 3): 0.0})
    assert contiguous(scores, 6, 2) == (3, 4)
    assert contiguous(distances(6, {(0, 2): 0.1}), 6, 2) == (0, 1)
    assert contiguous(distances(6, {(4, 6): 0.1}), 6, 2) == (4, 5)


def test_contiguous_takes_the_run_of_least_sum_where_units_are_scored_alone():
    """2 + 3 is less than 1 + 6, although 1 is the least."""
    assert contiguous({"mean": [9.0, 1.0, 6.0, 2.0, 3.0, 9.0]}, 6, 2) == (3, 4)


def test_contiguous_takes_the_earliest_of_equals():
    assert contiguous(distances(5, {(1, 3): 0.1, (3, 5): 0.1}), 5, 2) == (1, 2)


def test_last_keeps_the_very_last_block():
    """Gromov et al.: the layers L - n to L - 1, counted from 1."""
    assert last(None, 8, 3) == (4, 5, 6)
    assert last(None, 8, 7) == (0, 1, 2, 3, 4, 5, 6)


def test_random_is_seeded_and_nested():
    """One seed, one order: a larger cut contains the smaller."""
    cuts = [set(random(None, 12, remove, seed=3)) for remove in range(12)]
    assert [len(cut) for cut in cuts] == list(range(12))
    assert all(cuts[size] < cuts[size + 1] for size in range(11))
    assert len({random(None, 12, 4, seed=seed) for seed in range(20)}) > 10


RULES = [
    lambda total, remove: contiguous(distances(total, {}), total, remove),
    lambda total, remove: lowest({"mean": [0.0] * total}, total, remove),
    lambda total, remove: last(None, total, remove),
    lambda total, remove: random(None, total, remove, seed=0),
]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_removes_as_many_as_asked(rule):
    assert [len(set(rule(6, remove))) for remove in range(7)] == list(range(7))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("remove", [7, 8])
def test_more_blocks_than_there_are_is_refused(rule, remove):
    """Both numbers are named."""
    with pytest.raises(UserError, match=f"remove={remove}, but the model has 6 units"):
        rule(6, remove)


def test_scores_of_the_wrong_metric_are_refused():
    with pytest.raises(UserError, match="angular_distance"):
        contiguous({"mean": [0.1] * 7}, 6, 2)
    with pytest.raises(UserError, match="block_influence"):
        lowest(distances(6, {}), 6, 2)
    with pytest.raises(UserError, match="none were measured"):
        lowest(None, 6, 2)
