"""Laws of what is found by structure: blocks, norm and head of any decoder-only model, and what follows."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from families import ALL_FAMILIES, VOCABULARY, build
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3TextConfig

from sddx.commands import families
from sddx.compression.choose import PatchChoice, Pruning, last
from sddx.compression.pattern import period, require_kept, require_whole_periods
from sddx.compression.remove import apply_cut
from sddx.compression.soundness import UnsoundModel, prove
from sddx.errors import UserError
from sddx.export.formats import out_of_pattern
from sddx.models.anatomy import blocks, decoder, final_norm, head
from sddx.models.structure import Layout, layout, traced
from sddx.records import Cut
from sddx.students.trial import small_model, try_out
from sddx.training.trial import try_step
from sddx.training.tuning import coverage, lora

# Read in the source of each: body, blocks, norm.
KNOWN = {
    "gpt_neox": ("gpt_neox", "layers", "final_layer_norm"),
    "gpt_neox_serial": ("gpt_neox", "layers", "final_layer_norm"),
    "opt": ("model.decoder", "layers", "final_layer_norm"),
    "mpt": ("transformer", "blocks", "norm_f"),
}
DEPTH = 8


def wrapped(kind: str = "gemma3", depth: int = DEPTH):
    return CONFIG_MAPPING[kind](text_config={"num_hidden_layers": depth})


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_traced_layout_is_that_of_the_source(family: str) -> None:
    body, listed, norm = KNOWN.get(family, ("model", "layers", "norm"))
    assert layout(build(family)) == Layout(body, f"{body}.{listed}", f"{body}.{norm}", "lm_head")


def test_the_layout_is_that_of_the_class_whole_or_cut() -> None:
    model = build("llama")
    found = traced(model)
    apply_cut(model, Cut.without({1, 2}, 5))
    assert traced(model) == found == layout(model)


def test_of_two_lists_that_run_in_order_the_heavier_one_holds_the_blocks() -> None:
    """Some families run a small module beside each block."""
    model = build("llama")
    model.model.beside = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in blocks(model))
    for block, small in zip(blocks(model), model.model.beside, strict=True):
        block.register_forward_pre_hook(lambda *_, small=small: small(torch.zeros(1, 1)) and None)
    assert traced(model).blocks == "model.layers"


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "gptj", "gpt_oss", "falcon", "phi", "glm4_moe"])
def test_families_without_an_entry_lose_blocks_and_learn(kind: str) -> None:
    """Other names for everything, one fused linear layer of a class of its own (GPT-2), eager attention alone."""
    config = CONFIG_MAPPING[kind](num_hidden_layers=DEPTH)
    assert try_out(config, Cut.without({0, 4}, DEPTH), "eager")
    assert try_step(config, lora, "eager")


def test_linear_attention_keeps_its_states() -> None:
    """Three blocks of four have a state instead of keys and values; what is left decodes as it reads."""
    config = CONFIG_MAPPING["qwen3_next"](num_hidden_layers=DEPTH)
    assert try_out(config, Cut.without({0, 4}, DEPTH), "sdpa")
    assert try_step(config, lora, "sdpa")


def test_a_text_model_inside_a_wrapper_is_cut_and_its_tower_left_alone() -> None:
    model = small_model(wrapped(), "sdpa")
    before = deepcopy(model.config)
    tower = {name: weight.clone() for name, weight in model.named_parameters() if "vision" in name}
    shared = model.config
    apply_cut(model, Cut.without({1, 2}, DEPTH))
    assert len(blocks(model)) == model.config.text_config.num_hidden_layers == DEPTH - 2
    assert (
        len(model.config.text_config.layer_types) == DEPTH - 2 and decoder(model).config is model.config.text_config
    )
    assert shared.to_dict() == before.to_dict() and tower
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in tower.items())
    assert try_out(wrapped(), Cut.without({1, 2}, DEPTH), "sdpa")


def test_an_adapter_stays_off_what_reads_no_text() -> None:
    adapted, left = coverage(lora(small_model(wrapped(), "sdpa"), 0))
    assert "self_attn.q_proj" in adapted and not any("fc1" in name or "vision" in name for name in adapted)
    assert any("fc1" in name for name in left)


def test_head_and_norm_are_the_models_own_modules() -> None:
    model = build("opt")
    assert head(model) is model.lm_head and final_norm(model) is model.model.decoder.final_layer_norm


def test_a_model_that_heeds_padding_is_not_sound() -> None:
    """A block that looks at all positions, padding too, changes what a row says."""
    model = build("llama")
    apply_cut(model, Cut.without({1}, 5))
    plain = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda hidden: plain(hidden) + hidden.mean(1, keepdim=True)
    with pytest.raises(UnsoundModel, match="padding on the right changes its logits"):
        prove(model, vocabulary=VOCABULARY, again=None)


GEMMA = Gemma3TextConfig(num_hidden_layers=26)


def test_a_cut_of_whole_periods_keeps_the_pattern() -> None:
    assert period(GEMMA) == 6 and period(CONFIG_MAPPING["gpt2"]()) is None
    require_whole_periods(GEMMA, 12)
    require_kept(GEMMA, Cut.without(range(7, 13), 26))
    with pytest.raises(UserError, match=r"repeat after 6, and only multiples .* Give pruning.remove=6\."):
        require_whole_periods(GEMMA, 7)
    with pytest.raises(
        UserError, match=r"without blocks \[3, 4, 5, 9, 10, 11\] the kinds of blocks no longer repeat"
    ):
        require_kept(GEMMA, Cut.without({3, 4, 5, 9, 10, 11}, 26))
    with pytest.raises(UserError, match="of this gpt2 model have no kinds that repeat"):
        require_whole_periods(CONFIG_MAPPING["gpt2"](), 6)


def test_a_pattern_is_kept_by_cuts_of_blocks_alone() -> None:
    plain = PatchChoice(None, trained=False, fold=False)
    Pruning(last, 6, plain, keep_pattern=True)
    with pytest.raises(UserError, match="keep_pattern=true and pruning.units=attention"):
        Pruning(last, 6, plain, units="attention", keep_pattern=True)


def test_a_fixed_pattern_of_windows_is_compared_with_the_blocks() -> None:
    assert out_of_pattern(GEMMA, 6) == []
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(GEMMA))
    apply_cut(model, Cut.without({2}, 26))
    assert out_of_pattern(model.config, 6) == [4, 5, 10, 11, 16, 17, 22, 23]


def test_the_command_prints_a_row_for_each_family(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page"
    assert families.main(["only=llama,gpt2,gemma2,diffllama", f"to={page}"]) == 0
    said = capsys.readouterr().out
    assert "3 of 4 are sound." in said and "hangs on its number or the depth" in said
    assert "| gemma2 | model.layers | eager | yes |" in said
    row = next(line for line in page.read_text().splitlines() if line.startswith("| llama"))
    assert "model.layers" in row and "vLLM, llama.cpp" in row and row.endswith("| yes |")


def test_a_family_that_is_none_is_told_with_one_that_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    assert families.main(["only=lama"]) == 2
    assert "lama is no family of causal language models" in capsys.readouterr().err
