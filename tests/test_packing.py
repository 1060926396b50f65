"""Laws of rows that stand in one: each as if alone, steps as of padded ones, refused where one sees another."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from families import ALL_FAMILIES, build
from test_distributed import same, trained
from test_training import ADAPTER, EVERYTHING, SFT, examples, full, train, weights
from transformers import CONFIG_MAPPING

from sddx.data.encode import collate, pack
from sddx.errors import UserError
from sddx.models.anatomy import decoder
from sddx.models.outputs import run
from sddx.models.varlen import VARLEN, varlen
from sddx.pipeline import _learned
from sddx.records import Outputs
from sddx.stages.train.check import _check_rollouts
from sddx.training.batches import micro_batches, plan
from sddx.training.losses import squarehead
from sddx.training.objective import Layerwise, Objective
from sddx.training.trial import require_packable
from sddx.training.tuning import lora

PACKABLE = [family for family in ALL_FAMILIES if family != "mpt"]
EXPERTS = ("mixtral", "qwen3_moe")
PAPER = Objective(data="reference", terms={"squarehead": Layerwise(loss=squarehead)})


def logits(outputs: Outputs) -> torch.Tensor:
    return outputs.head(outputs.hidden)[0]


@pytest.mark.fast
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKABLE)
def test_each_row_in_a_pack_is_what_it_is_alone(family: str, attention: str) -> None:
    """Logits and the states of all blocks, of rows longer and shorter than the windows of some blocks."""
    if (family, attention) == ("opt", "eager"):
        pytest.skip("its eager attention makes a mask of its own, and the pair is refused")
    model, rows = build(family), examples(7)
    model.set_attn_implementation(attention)
    # Eager attention has its softmax in float32, and experts know no float64.
    exact = family not in EXPERTS and attention == "sdpa"
    model = model.double() if exact else model
    with torch.no_grad(), varlen(model):
        together = run(model, **pack(rows).inputs, states=True)
    apart = [run(model, **collate([row], 1).inputs, states=True) for row in rows]
    same = partial(torch.testing.assert_close, rtol=0, atol=1e-10 if exact else 1e-5)
    same(logits(together), torch.cat([logits(each) for each in apart]))
    for number, states in enumerate(together.states):
        same(states, torch.cat([each.states[number] for each in apart], 1))
    assert decoder(model).config._attn_implementation == attention


@pytest.mark.fast
def test_without_positions_rows_would_see_one_another() -> None:
    """What keeps them apart are the positions that begin again, and nothing else."""
    model, batch = build("llama").double(), pack(examples(4))
    with torch.no_grad(), varlen(model):
        apart, mixed = (run(model, batch.input_ids, **more) for more in (
            {"position_ids": batch.position_ids},
            {"position_ids": torch.arange(batch.input_ids.shape[1])[None]},
        ))  # fmt: skip
    first = len(batch.rows[0][0])
    torch.testing.assert_close(apart.hidden[:, :first], mixed.hidden[:, :first], rtol=0, atol=1e-10)
    assert (apart.hidden - mixed.hidden)[:, first:].abs().max() > 0.1


@pytest.mark.fast
def test_a_pack_has_no_padding_and_tells_its_rows() -> None:
    """Rows, labels and totals are those of the padded step; the last token of a row predicts nothing."""
    rows = examples(13)
    for step in plan(rows, 0, batch_size=3, accumulate=2):
        padded, packed = (micro_batches(rows, step, pad_id) for pad_id in (1, None))
        assert [batch.rows for batch in padded] == [batch.rows for batch in packed]
        assert all(batch.to("cpu").rows == batch.rows for batch in packed)
        assert sum(batch.input_ids.numel() for batch in packed) == step.totals.attended
        assert all(batch.attention_mask.all() for batch in packed)
        assert sum((batch.labels != -100).sum() for batch in packed) == step.totals.labelled


@pytest.mark.parametrize("tune", [ADAPTER, full], ids=["lora", "full"])
@pytest.mark.parametrize("objective", [SFT, EVERYTHING, PAPER], ids=["sft", "everything", "squarehead"])
def test_a_packed_training_is_the_padded_one(tmp_path, objective: Objective, tune: Any) -> None:
    """Same losses, gradients and weights after steps of several micro-batches, the last of them short, with a
    shared teacher and a separate one, blocks computed again or not. Without dropout, which draws otherwise."""
    tune = tune if tune is full else partial(tune, dropout=0.0)
    settings = dict(tune=tune, objective=objective, dtype=torch.float64, rows=examples(13), held_out=5,
                    batch_size=3, accumulate=2, head_chunk=4)  # fmt: skip
    padded, report = train(tmp_path / "padded", **settings)
    for again in (False, True):
        out = tmp_path / f"packed{again}"
        packed, other = train(out, packing=True, gradient_checkpointing=again, **settings)
        torch.testing.assert_close(weights(packed), weights(padded), rtol=0, atol=1e-9)
        for name in ("train", "validation"):
            assert other[name] == pytest.approx(report[name], rel=1e-8)
        assert other["attended_tokens"] == report["attended_tokens"]
        assert decoder(packed).config._attn_implementation == "sdpa"


def test_two_processes_share_packed_micro_batches(tmp_path, quick_groups) -> None:
    """And find what one finds with padded ones, steps that do not divide by two included."""
    tune = partial(lora, rank=2, alpha=4)
    two = trained(tmp_path / "two", "ddp", tune=tune, packing=True)
    same(two, trained(tmp_path / "one", "single", tune=tune))


def test_packed_rows_attend_without_a_mask(tmp_path, monkeypatch) -> None:
    """In the student and in its teacher, in training and on held-out rows: no pass has any other attention."""
    seen = set()
    body = type(decoder(build("llama"))).forward

    def watched(self: Any, *arguments: Any, **named: Any) -> Any:
        seen.add((self.config._attn_implementation, "attention_mask" in named, tuple(named["input_ids"].shape)[0]))
        return body(self, *arguments, **named)

    monkeypatch.setattr(type(decoder(build("llama"))), "forward", watched)
    train(tmp_path, objective=EVERYTHING, packing=True, held_out=3, tune=full)
    assert seen == {(VARLEN, False, 1)}


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("bloom", "eager"),  # biases by the distance in the flat row
        ("mpt", "eager"),
        ("mamba", "eager"),  # a state runs through all rows
        ("falcon_h1", "sdpa"),
        ("qwen3_next", "sdpa"),
        ("opt", "eager"),
        ("mpt", "sdpa"),  # which there is not
        ("llama", "flex_attention"),  # not tried
    ],
)
def test_where_one_row_would_see_another_is_refused(kind: str, attention: str) -> None:
    config = CONFIG_MAPPING[kind](**{"n_layers" if kind == "mpt" else "num_hidden_layers": 4})
    with pytest.raises(UserError, match=rf"trainer.packing=true.*({kind}|{attention}).*trainer.packing=false"):
        require_packable(config, attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "deepseek_v3"])
def test_what_keeps_rows_apart_goes_through(kind: str, attention: str) -> None:
    require_packable(CONFIG_MAPPING[kind](num_hidden_layers=4), attention)


def test_windows_are_shorter_than_the_rows_that_are_tried(monkeypatch) -> None:
    """A family whose windows are lost on the way is refused, however long they are in its models."""
    monkeypatch.setattr("sddx.models.varlen._window", lambda *_: None)
    with pytest.raises(UserError, match="mistral.*trainer.packing=false"):
        require_packable(CONFIG_MAPPING["mistral"](num_hidden_layers=2, sliding_window=4096), "sdpa")


@pytest.mark.fast
def test_rows_that_the_student_writes_are_not_packed() -> None:
    method = {"loss": {"rollouts": {"share": 1.0}}, "trainer": {"packing": True}}
    with pytest.raises(UserError, match=r"loss\.rollouts.*trainer.packing=false"):
        _check_rollouts(method)
    _check_rollouts({**method, "trainer": {"packing": False}})


@pytest.mark.fast
def test_packing_is_in_a_key_only_where_it_is_asked_for() -> None:
    """Dropout draws otherwise over packed rows; keys from before there was packing stay."""
    trainer = {"budget": "examples", "epochs": 3, "batch_size": 16}
    assert _learned({**trainer, "packing": False}) == _learned(trainer)
    assert _learned({**trainer, "packing": True}) == {**_learned(trainer), "packing": True}
