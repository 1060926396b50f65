"""Laws of families: what a block is hangs on it, not on its number or the depth, or the family is refused."""

from __future__ import annotations

import json

import pytest
import torch
from families import VOCABULARY, build
from transformers import CONFIG_MAPPING

from sddx.compression import soundness
from sddx.compression.remove import apply_cut
from sddx.compression.soundness import UnsoundModel, prove, sliced_logits
from sddx.errors import UserError
from sddx.models.anatomy import blocks, stack
from sddx.models.narrow import built, narrow
from sddx.records import Artifact, Cut
from sddx.runtime import Runtime
from sddx.stages.prune import run as stage
from sddx.students.trial import try_out

DEPTH = 5
# Settings by which blocks differ, told by kinds, by numbers, by a first number, by a period.
FAMILIES = {
    "granite": {}, "cohere2": {}, "smollm3": {}, "gpt_oss": {}, "glm4_moe": {"first_k_dense_replace": 2},
    "deepseek_v3": {"first_k_dense_replace": 2}, "afmoe": {"num_dense_layers": 2}, "qwen3_next": {},
    "ernie4_5_moe": {"moe_layer_start_index": 2}, "llama4_text": {"moe_layers": [1, 3]},
    "qwen3_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
}  # fmt: skip


def config(kind, **settings):
    return CONFIG_MAPPING[kind](num_hidden_layers=DEPTH, **settings)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_block_is_what_it_was_wherever_it_stands(kind):
    """Cut, saved and loaded, and against the kept blocks run by hand; the dense ones are among those that go."""
    assert try_out(config(kind, **FAMILIES[kind]), Cut.without({0, 2}, DEPTH), "eager")


@pytest.mark.parametrize("kind", ["diffllama", "minicpm3"])
def test_constants_of_depth_or_position_are_refused_in_a_sentence(kind):
    """The differential attention's lambda is that of the block's number, the residual scale that of the depth."""
    with pytest.raises(UserError, match=f"narrow {kind} model .* hangs on its number or the depth"):
        try_out(config(kind), Cut.without({2}, DEPTH), "eager")


def test_blocks_with_settings_by_number_are_refused():
    """Gemma4 keeps those of its full-attention blocks under their numbers."""
    model = build("qwen3")
    model.config.per_layer_config = {1: {"intermediate_size": 32}}
    with pytest.raises(UserError, match="told by the blocks' numbers"):
        blocks(model)


@pytest.mark.parametrize(
    "kind, name, before, after",
    [
        ("llama4_text", "moe_layers", [0, 1, 2, 3, 4], [0, 1, 2]),  # as many numbers as blocks
        ("llama4_text", "moe_layers", [1, 2, 4], [0, 2]),
        ("llama4_text", "no_rope_layers", [1, 1, 0, 1, 0], [1, 1, 0]),
        ("glm4_moe", "first_k_dense_replace", 2, 1),
        ("ernie4_5_moe", "moe_layer_start_index", 3, 1),
        ("ernie4_5_moe", "moe_layer_end_index", 3, 1),
        ("qwen3_moe", "mlp_only_layers", [0, 3], [1]),
    ],
)
def test_settings_that_number_blocks_follow_them(kind, name, before, after):
    """And come back with the whole stack. Blocks 1, 3 and 4 are kept."""
    small = narrow(config(kind, **{name: before}), width=32, vocabulary=VOCABULARY)
    model = built(small, torch.float32, attn_implementation="eager")
    whole = apply_cut(model, Cut.without({0, 2}, DEPTH))
    assert getattr(model.config, name) == after
    assert whole.settings[name] == before and stack(model).settings[name] == after


def saved(folder, kind):
    small = narrow(config(kind), width=32, vocabulary=VOCABULARY)
    built(small, torch.float32, attn_implementation="eager").save_pretrained(folder)
    return Artifact("model", "key", folder)


def pruned(model, out):
    out.mkdir()
    choose = {"_target_": "sddx.compression.choose.last", "_partial_": True}
    how = {"dtype": "float32", "attention": "eager"}
    stage.prune(out, base=model, runtime=Runtime(), choose=choose, remove=2, units="blocks", **how)
    return json.loads((out / "proof.json").read_text())


def test_weights_too_large_to_copy_are_proven_on_a_narrow_model(tmp_path, monkeypatch):
    """Where a family holds, and where it does not."""
    monkeypatch.setattr(soundness, "LARGEST_COPY", 0)
    proof = pruned(saved(tmp_path / "granite", "granite"), tmp_path / "first")
    assert proof["head_equals_model"] and "reload_equal" not in proof and proof["reloaded"] == "narrow model"
    with pytest.raises(UserError, match="hangs on its number"):
        pruned(saved(tmp_path / "diffllama", "diffllama"), tmp_path / "second")


@pytest.mark.parametrize("narrow_one", [False, True])
def test_what_is_too_large_is_never_copied(narrow_one, tmp_path, monkeypatch):
    """Also where no narrow model can be made; the proof says what was saved and loaded."""
    monkeypatch.setattr(soundness, "LARGEST_COPY", 0)
    monkeypatch.setattr(stage, "try_out", lambda *_: narrow_one)
    monkeypatch.setattr(stage, "saved_and_loaded", lambda *_, **__: pytest.fail("a copy was made"))
    proof = pruned(saved(tmp_path / "llama", "llama"), tmp_path / "out")
    assert proof["reloaded"] == ("narrow model" if narrow_one else None) and "reload_equal" not in proof


def test_an_attention_that_needs_a_gpu_is_tried_by_plain_products():
    assert try_out(config("llama"), Cut.without({2}, DEPTH), "flash_attention_2")


def test_a_block_that_changed_is_found_by_the_kept_blocks_run_one_by_one():
    """The reference is taken before the cut and passes by the model's own loop."""
    model, cut = build("gemma3"), Cut.without({1, 2}, DEPTH)
    expected = sliced_logits(model, cut, vocabulary=VOCABULARY)
    apply_cut(model, cut)
    assert prove(model, vocabulary=VOCABULARY, again=None, sliced=expected)["blocks"] == 3
    blocks(model)[1].self_attn.scaling *= 2
    with pytest.raises(UnsoundModel, match="not those of the kept blocks"):
        prove(model, vocabulary=VOCABULARY, again=None, sliced=expected)


def test_an_unsound_model_is_a_mistake_in_a_sentence():
    """Also where the library itself fails over it."""
    model = build("llama")
    apply_cut(model, Cut.without({1}, DEPTH))
    model.model.layers[1].mlp = None
    with pytest.raises(UserError, match="not sound: TypeError.*Remove other blocks"):
        prove(model, vocabulary=VOCABULARY, again=None)
