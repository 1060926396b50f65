"""Laws of what a run is said to cost before it is run."""

from __future__ import annotations

import re
import shutil
import time
from copy import deepcopy
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composing import composed, resolve
from families import ALL_FAMILIES
from families import build as family_model
from forked import command
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING

from sddx import stages
from sddx.compression.remove import apply_cut
from sddx.config.shared import sharing
from sddx.errors import UserError
from sddx.estimate import costs, devices, memory
from sddx.estimate.costs import distinct, seconds
from sddx.estimate.devices import (
    DEVICES,
    PROBED,
    Device,
    _duration,
    _known,
    _two_blocks,
    device_of,
    probed,
    this_machine,
)
from sddx.estimate.efforts import Effort
from sddx.estimate.peaks import peaks
from sddx.estimate.show import _way_out, device_for, heaviest, hours, require, show
from sddx.estimate.skeleton import removed, shape_of, size_of, skeleton
from sddx.models.anatomy import blocks, decoder
from sddx.models.narrow import built, smallest
from sddx.stages.cost import estimated
from sddx.stages.evaluate import cost as evaluating
from sddx.stages.folders import STAGES, modules
from sddx.stages.patch.cost import junctions
from sddx.stages.train.cost import remedies

# docs/sources.md: billions of parameters and the saving, for 2, 4, 6, 8, 10 of 32 blocks.
SAVINGS = {
    "llama31_8b_instruct": (
        8_030_261_248,
        [(7.594, 5.43), (7.158, 10.86), (6.722, 16.30), (6.285, 21.73), (5.849, 27.16)],
    ),
    "mistral_7b_instruct_v03": (
        7_248_023_552,
        [(6.812, 6.02), (6.376, 12.04), (5.939, 18.06), (5.503, 24.07), (5.067, 30.09)],
    ),
}


def configured(*overrides: str) -> dict[str, Any]:
    with composed(*overrides) as cfg:
        return resolve(cfg)


@pytest.mark.parametrize("model", SAVINGS)
def test_parameters_agree_with_the_known_table(model: str) -> None:
    config, (whole, rows) = configured(f"model={model}")["model"], SAVINGS[model]
    for count, (billions, saving) in zip(range(2, 11, 2), rows, strict=True):
        student = skeleton(shape_of(config), "bfloat16")
        assert size_of(student).parameters == whole
        removed(student, "blocks", count)
        left = size_of(student).parameters
        assert round(left / 1e9, 3) == billions and round(100 * (1 - left / whole), 2) == saving


EXPERTS = ("mixtral", "qwen3_moe", "qwen2_moe", "ernie4_5_moe")  # whose number each config calls otherwise


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi3", "gpt_neox", *EXPERTS])
def test_flops_are_those_that_pytorch_counts(family: str) -> None:
    """Prefill with the last token's logits, and one step of decoding, with eager attention; of experts, those that
    tokens were sent to."""
    if family in ALL_FAMILIES:
        model = family_model(family)
    else:
        model = built(smallest(CONFIG_MAPPING[family](num_hidden_layers=4)), torch.float32).eval()
    if family in EXPERTS:
        model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    size, context = size_of(model), 8  # within every window
    mask = torch.zeros(1, 1, context, context)
    ids = torch.zeros(1, context, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
    assert counter.get_total_flops() == pytest.approx(context * size.prefill(context), rel=1e-3)
    cache = model(input_ids=ids[:, 1:], attention_mask=mask[..., 1:, 1:], use_cache=True).past_key_values
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids[:, :1], attention_mask=mask[..., :1, :], past_key_values=cache)
    assert counter.get_total_flops() == pytest.approx(size.decode(context), rel=1e-3)


@pytest.mark.parametrize(("units", "count"), [("blocks", 2), ("blocks", 5), ("attention", 2), ("sublayers", 3)])
def test_a_cut_skeleton_is_as_large_as_the_cut_model(units: str, count: int) -> None:
    """Parameters and cache, without a weight."""
    real = family_model("llama")
    bare = skeleton(real.config, "float32")
    apply_cut(real, removed(bare, units, count))
    made, true = size_of(bare), size_of(real)
    assert made == true


def test_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"remove=6, but the model has 5"):
        removed(skeleton(family_model("llama").config, "float32"), "blocks", 6)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_can_be_planned(family: str) -> None:
    """Sizes as those of the real model, and memory that grows with the batch. (Experts compute in bfloat16 alone on
    a device without numbers.)"""
    real = family_model(family)
    ghost = skeleton(real.config, "bfloat16")
    made, true = size_of(ghost), size_of(real)
    assert (made.parameters, 2 * made.cache_bytes) == (true.parameters, true.cache_bytes)
    few, many = (memory.reading(ghost, rows, 16) for rows in (2, 8))
    assert 2 * few < many


def small(depth: int) -> Any:
    config = shape_of({"dimensions": dict(model_type="llama", vocab_size=64, hidden_size=256, intermediate_size=512,
                                          num_hidden_layers=depth, num_attention_heads=4)})  # fmt: skip
    return skeleton(config, "float32")


def test_a_checkpointed_block_holds_one_hidden_state() -> None:
    """Depth costs rows x tokens x width numbers a block, and no more."""
    rows, length, held = 2, 128, []
    for depth in (4, 8):
        model = small(depth)
        decoder(model).embed_tokens.requires_grad_(True)
        held.append(memory.learning(model, rows, length, checkpointing=True))
    assert held[1] - held[0] == 4 * rows * length * 256 * 4


@pytest.mark.parametrize("gradients", [False, True])
def test_traced_memory_is_what_the_profiler_sees(gradients: bool) -> None:
    """A pass on the CPU with fused attention, against the same pass on the meta device."""
    from transformers import LlamaForCausalLM

    ghost, rows, length = small(6), 2, 256
    real = LlamaForCausalLM(deepcopy(ghost.config)).requires_grad_(gradients)
    real.set_attn_implementation("sdpa")
    ghost.requires_grad_(gradients)
    traced = (
        memory.learning(ghost, rows, length, checkpointing=False)
        if gradients
        else memory.reading(ghost, rows, length)
    )
    ids = torch.zeros(rows, length, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, torch.set_grad_enabled(gradients):
        hidden = decoder(real)(input_ids=ids, use_cache=False)[0]
        if gradients:
            hidden.sum().backward()
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert traced == pytest.approx(peak, rel=0.1)


def test_work_that_runs_share_is_counted_once() -> None:
    """Two seeds share everything but training and what is judged after it; a smaller data set adds no rows."""
    one, other = (estimated(configured(f"seed={seed}", "dataset.size=512")) for seed in (0, 1))
    less = estimated(configured("dataset.size=256"))
    both = distinct([*one.parts(), *other.parts()])
    again = [part.stage for part in both][len(one.parts()) :]
    assert again == ["train", "evaluate recovered"]
    added = {part.stage for part in distinct([*one.parts(), *less.parts()])[len(one.parts()) :]}
    assert added == {"train", "written", "evaluate recovered"}
    device = DEVICES["h100"]
    assert hours([one, other], device) < hours([one], device) + hours([other], device)  # type: ignore[operator]


def test_arms_differ_in_what_they_pay_for() -> None:
    """References are not written, a teacher is read, an untouched model is not trained."""
    stages = {}
    for loss in ("sft", "sdd", "kd"):
        parts = estimated(configured(f"loss={loss}")).parts()
        stages[loss] = {part.stage: part for part in parts}
    assert "distill" not in stages["sft"] and stages["sdd"]["distill"].steps > 0
    assert stages["kd"]["train"].reading > 0 == stages["sft"]["train"].reading


def test_answers_are_paid_for_once_whatever_they_are_checked_by() -> None:
    """Another reference is shown for other answers, and another check reads the same ones."""
    given = [(), ("selfdata.check=none",), ("selfdata.check=none", "selfdata.reference=wrong")]
    parts = [estimated(configured("loss=sdd", *each)).parts() for each in given]
    first, other, wrong = ({part.key for part in of if part.stage == "distill"} for of in parts)
    assert first == other and first and not first & wrong


@sharing()  # as within a grid
def test_what_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too small, before any work: the stage, both sizes, and overrides under which training fits."""
    config = configured("model=llama31_8b_instruct", "max_length=1024", "dataset=tiny_arithmetic")
    room = 40e9
    found = remedies(estimated(config), room)
    assert found and all(name.startswith(("trainer.", "tuning=qlora")) for name in found)
    assert peaks(estimated(config))["train"] > room
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = type("Properties", (), {"total_memory": room})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    with pytest.raises(UserError, match=r"train needs about \d+ GB, and this GPU has 40.*gradient_checkpointing"):
        require([{**config, "device": "cuda"}], estimated)
    properties.total_memory = 14e9  # less than the weights: no stage fits, and all are told
    with pytest.raises(UserError) as caught:
        require([{**config, "device": "cuda"}], estimated)
    told = [mistake.split(" needs")[0].removeprefix("The stage ") for mistake in caught.value.args]
    assert told == ["score", "prune", "distill", "train", "written", "evaluate"]
    assert "batch_size" not in caught.value.args[-1] and "bfloat16" not in caught.value.args[-1]


def test_more_than_the_budget_is_refused() -> None:
    config = configured("model=llama31_8b_instruct", "gpu=h100", "budget.gpu_hours=0.01")
    with pytest.raises(UserError, match=r"budget\.gpu_hours=0\.01"):
        require([config], estimated)
    require([configured("gpu=h100", "budget.gpu_hours=10")], estimated)


SLOW = Device("slow", 1e12, reading=1e6, learning=1e6, bandwidth=1e15, launch=0.0)


def test_writing_takes_no_less_than_it_computes() -> None:
    """On a device whose memory is no bound, as on a CPU: of every stage that writes at least the FLOPs of what it
    writes, and of a batch twice as large twice as long."""
    given = ("+speculation=draft", "+drift=full")
    estimates = [estimated(configured(f"loss={loss}", *given)) for loss in ("on_policy", "sdd")]
    writing = [part for estimate in estimates for part in estimate.parts() if part.steps]
    assert {part.stage.split()[0] for part in writing} == {"distill", "train", "draft", "drift", "evaluate"}
    size = estimates[0].pruned
    for part in writing:
        spent = part.seconds(SLOW) - (part.reading + part.learning) / 1e6
        assert spent * 1e6 > 0.99 * part.tokens["written"] * size.decode(0), part.stage
    effort = Effort(steps=8, written=8)
    parts = [estimates[0].part("it", rows, size, effort, rows=rows, cached=9 * rows) for rows in (4, 8)]
    few, many = (part.seconds(SLOW) for part in parts)
    assert many == pytest.approx(2 * few)


def judged(**changes: Any) -> tuple[Any, dict[str, Any]]:
    """A plan of one evaluation task, and the settings of the evaluation under these changes."""
    estimate = estimated(configured("model=llama31_8b_instruct", "evaluation=full", "evaluation.tasks=[hellaswag]"))
    return estimate, {**estimate.config["evaluation"], **changes}


def test_a_plan_knows_where_beginnings_are_read_once() -> None:
    """By the rule of the evaluation itself, and by a model of the same architecture."""
    estimate, asked = judged()
    assert estimate.judging(asked).packed
    for changes in ({"encoding": "lm_eval"}, {"batch_size": 1}):
        assert not estimate.judging({**asked, **changes}).packed
    estimate.config["trainer"]["strategy"] = "fsdp"
    assert not estimate.judging(asked).packed
    for family in ("mpt", "gemma3"):  # which counts its places itself; whose windows are shorter than the texts
        other = estimated(configured())
        other.shape = family_model(family).config
        assert not other.judging(other.config["evaluation"]).packed


@sharing()  # as within a grid
def test_a_smaller_batch_is_advised_where_it_helps() -> None:
    """Shared beginnings are read so many tokens at once whatever the batch is; apart from each other they are read
    in batches with all their logits."""
    estimate, asked = judged(batch_size=256)
    packed, fewer, apart = (
        estimate.varied(evaluation={**asked, **changes})
        for changes in ({}, {"batch_size": 8}, {"encoding": "lm_eval"})
    )
    need = peaks(packed)["evaluate"]
    assert need == peaks(fewer)["evaluate"] < 1.2 * estimate.unpruned.weight_bytes < peaks(apart)["evaluate"]
    assert "batch_size" not in _way_out(packed, "evaluate", need)
    assert "lower evaluation.batch_size" in _way_out(apart, "evaluate", 40e9)


def test_devices_that_are_in_use_are_not_advised() -> None:
    """Nor anything where nothing would do."""
    config = configured("tuning=full")
    shared = {**config, "trainer": {**config["trainer"], "strategy": "fsdp", "devices": 2}}
    for name in ("train", "evaluate"):
        assert "fsdp" in _way_out(estimated(config), name, 1e6)
        assert "fsdp" not in (said := _way_out(estimated(shared), name, 1e6)) and "more memory" in said


@sharing()  # as within a grid
@pytest.mark.parametrize(
    ("loss", "given"),
    [
        ("sdd", ["+speculation=draft"]),
        ("sdd", ["+drift=full"]),
        ("on_policy", ["trainer.accumulate=16"]),
    ],
)
def test_what_needs_most_is_among_the_heaviest(loss: str, given: list[str]) -> None:
    """Of a run that is pruned more and asks for more, no stage is forgotten for one that is pruned less."""
    few, more = (
        estimated(configured(f"loss={loss}", "pruning.remove=2")),
        estimated(configured(f"loss={loss}", "pruning.remove=4", *given)),
    )
    told = [peaks(estimate) for estimate in heaviest([few, more])]
    for stage, held in peaks(more).items():
        assert max(found.get(stage, 0) for found in told) >= held, stage


def test_a_probe_measures_this_machine() -> None:
    """A speed that is measured gives hours where a CPU's stated one gives none."""
    estimate = estimated(configured())
    device = device_of("cpu")
    assert seconds(estimate.parts(), device) is None
    found = seconds(estimate.parts(), probed(device, estimate.shape, "float32", 0.3))
    assert found is not None and all(spent > 0 for spent in found.values())


def test_a_probe_counts_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock by which everything takes a second, speeds are the FLOPs that PyTorch counts; of decoding, as
    many times the weights as there were steps."""
    counted: list[int] = []

    def a_second(work: Any, *_: Any) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        counted.append(counter.get_total_flops())
        return 1.0

    monkeypatch.setattr(devices, "_duration", a_second)
    dimensions = dict(model_type="llama", hidden_size=512, intermediate_size=4096, num_attention_heads=4)
    config = shape_of({"dimensions": dimensions})
    config._attn_implementation = "eager"
    found = probed(device_of("cpu"), config, "float32", 0.3)
    read, decoded, learned = counted
    assert found.reading == pytest.approx(read, rel=0.01) and found.learning == pytest.approx(learned, rel=0.1)
    two = _two_blocks(config, "float32", "cpu")
    held = sum(weight.nbytes for weight in decoder(two).parameters())
    steps = decoded / size_of(two).body(PROBED)
    assert steps > 1 and found.bandwidth == pytest.approx(steps * held, rel=0.05)


def test_a_clock_counts_seconds() -> None:
    """Of the calls that it times, of which the first is not one."""
    slept = iter([0.5, *[0.01] * 9])
    assert 0.01 <= _duration(lambda: time.sleep(next(slept)), 0.03, "cpu") < 0.25


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
def test_models_that_forget_are_probed_too(family: str) -> None:
    """One whose windows are shorter than the text, and one of whose blocks some remember no keys at all."""
    narrow = smallest(CONFIG_MAPPING[family](num_hidden_layers=4)) if family == "qwen3_next" else None
    config = narrow or family_model(family).config
    found = probed(device_of("cpu"), config, "float32", 0.01)
    assert found.reading and found.learning and found.bandwidth


def test_a_probe_is_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures are never those of a device that is not here, and memory is what the card has."""
    estimate = estimated(configured())
    with pytest.raises(UserError, match="no GPU, and gpu=h100"):
        device_for(configured("gpu=h100", "probe=0.1s"), estimate)
    assert "CPU, probed" in device_for(configured("probe=0.1s"), estimate).name
    card = SimpleNamespace(name="NVIDIA A100-SXM4-40GB", total_memory=42e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    found = this_machine(None)
    assert found == device_of(None) and found.memory == 42e9 and found.reading == DEVICES["a100"].reading
    with pytest.raises(UserError, match="an a100, and gpu=h100"):
        this_machine("h100")
    for name in ("NVIDIA GH200 480GB", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert _known(name) is None
    assert _known("NVIDIA H100 80GB HBM3") == "h100" and _known("NVIDIA GeForce RTX 4090") == "rtx4090"
    card.name = "NVIDIA H100 PCIe"
    with pytest.raises(UserError, match="in no table"):
        this_machine(None)
    assert this_machine("h100").name == card.name
    for name in ("NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB"):
        card.name = name
        with pytest.raises(UserError, match="and gpu=cpu"):
            this_machine("cpu")


def test_large_data_is_counted_on_disk() -> None:
    """As a download, once for calibration and text; of rows only where there is training."""
    disk = estimated(configured("+experiment=llama2_depth_curve")).disk()
    assert disk["data"] == 24e9 and "data" not in estimated(configured("+experiment=llama_26L")).disk()


@sharing()  # as within a grid
def test_shards_hold_a_share_of_the_weights() -> None:
    """Over four devices less than half of what one holds: a quarter, the pass itself and the block at hand. What a
    proof holds whole is in host memory."""
    alone = configured("model=llama31_8b_instruct", "tuning=full", "trainer.batch_size=1")
    shared = {**alone, "trainer": {**alone["trainer"], "strategy": "fsdp", "devices": 4}}
    one, four = (peaks(estimated(config)) for config in (alone, shared))
    assert one.keys() - four.keys() == {"prune"}
    assert four["train"] < 0.5 * one["train"]
    weights = 16.06e9
    for stage in ("score", "distill"):
        assert 0.55 * weights < one[stage] - four[stage] < 0.75 * weights


def test_a_disk_too_small_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type("usage", (), {"free": 10**9})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"needs .* GB in the store .*1\.0 GB are free"):
        require([configured("model=llama31_8b_instruct", "tuning=full", f"store={tmp_path}")], estimated)
    require([configured("model=llama31_8b_instruct", f"store={tmp_path}")], estimated)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match="gpu='abacus' is not known"):
        device_of("abacus")


def test_dimensions_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.dimensions"):
        shape_of({"dimensions": {"model_type": "abacus"}})


def test_the_command_plans_a_grid_and_leaves_nothing(tmp_path: Path) -> None:
    given = ["+experiment=llama_26L", "pruning.remove=4,6", "gpu=h100", "--multirun"]
    done = command("sddx.commands.plan", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "16.30%" in done.stdout and "10.86%" in done.stdout and "2 runs on H100" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_skeleton_leaves_its_config_as_it_was() -> None:
    """Depth, and how models of it attend: the same config makes real models, in a probe for one."""
    config = family_model("llama").config
    before = config.to_dict() | {"attends": config._attn_implementation}
    ghost = skeleton(config, "float32")
    removed(ghost, "blocks", 2)
    assert config.to_dict() | {"attends": config._attn_implementation} == before
    assert len(blocks(ghost)) == config.num_hidden_layers - 2


def told(*overrides: str) -> str:
    """What a plan of this configuration prints."""
    config, out = configured("gpu=h100", *overrides), StringIO()
    show([estimated(config)], config, Console(file=out, width=200))
    return out.getvalue()


@sharing()  # as within a grid
def test_full_weights_are_judged_beside_the_unpruned_model() -> None:
    """One model in the other's weights with an adapter, two with weights of its own."""
    adapted, whole = (estimated(configured("tuning=" + name)) for name in ("lora", "full"))
    more = peaks(whole)["evaluate"] - peaks(adapted)["evaluate"]
    assert more == pytest.approx(1.03 * whole.pruned.weight_bytes)


@sharing()  # as within a grid
def test_another_teacher_is_a_model_more() -> None:
    own, other = (estimated(configured("loss=kd", f"teacher={name}")) for name in ("null", "some/model"))
    more = peaks(other)["train"] - peaks(own)["train"]
    assert more == pytest.approx(1.03 * own.pruned.weight_bytes)  # the student's, beside a whole teacher's
    assert "some/model is taken to be as large" in told("loss=kd", "teacher=some/model")
    assert "is taken to be" not in told("loss=sft", "teacher=some/model")


@sharing()  # as within a grid
def test_gradients_of_all_blocks_are_held_while_they_are_scored() -> None:
    """Taylor's scores need them; coalitions do not."""
    few = ("calibration.size=8", "model=llama31_8b_instruct")
    taylor, coalitions = (estimated(configured(f"pruning={name}", *few)) for name in ("taylor", "greedy"))
    gradients = 2 * 32 * 218_112_000  # bfloat16, of blocks (docs/sources.md)
    assert peaks(taylor)["score"] > taylor.unpruned.weight_bytes + gradients > peaks(coalitions)["score"]


def test_vllm_needs_a_folder_of_merged_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As large as the pruned model, in the store, before any work; and its hours are not known."""
    given = ("evaluation.backend=vllm", f"store={tmp_path}")
    estimate = estimated(configured(*given))
    assert estimate.disk()["while evaluating"] == estimate.pruned.weight_bytes
    assert "while evaluating" not in estimated(configured()).disk()
    assert "Hours of evaluation are those of Hugging Face" in told(*given)
    assert "Hugging Face" not in told()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("usage", (), {"free": 10**9}))
    with pytest.raises(UserError, match=r"needs 13\.5 GB in the store"):
        require([configured("model=llama31_8b_instruct", "pruning.remove=6", *given)], estimated)


def test_a_plan_of_no_training_tells_of_none() -> None:
    """Nor of rows, which are not read: they need not be there."""
    said = told("loss=none", "dataset=jsonl", "dataset.path=not_there.jsonl")
    assert not any(word in said for word in ("Trained", "Rows", "training", "student", "train ", "recovered"))
    assert "evaluate pruned" in said


@sharing()  # as within a grid
def test_scoring_alone_counts_every_metric_and_nothing_else() -> None:
    """Metrics of states share a pass; what a run holds and keeps is not told."""
    few, many = (estimated(configured("stages=[score]", f"metrics={name}")) for name in ("one_pass", "all"))
    (one,), (all_of_them,) = few.parts(), many.parts()
    assert one.reading == estimated(configured()).parts()[0].reading < all_of_them.reading / 20
    assert peaks(many).keys() == {"score"}
    said = told("stages=[score]")
    assert "Disk" not in said and "Rows" not in said


def test_rows_held_out_are_not_trained_on(tmp_path: Path) -> None:
    """`dataset.size` counts the others."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "one", "response": "two"}\n' * 10)
    mine = ("dataset=jsonl", f"dataset.path={file}", "validation=4")
    for given, sizes in ((mine, {"null": 6, 5: 5}), (("dataset=gsm8k",), {"null": 7_473 - 64, 100: 100})):
        for size, count in sizes.items():
            assert estimated(configured(*given, f"dataset.size={size}")).rows.count == count


def test_a_plan_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two runs that hold the same, one is traced; their texts and rows are read once each."""
    traced, read = list[int](), list[str]()
    monkeypatch.setattr(evaluating, "peak", lambda estimate: traced.append(1) or 1.0)
    for name in ("rows_of", "texts_of"):
        real = getattr(costs, name)
        monkeypatch.setattr(costs, name, lambda *given, real=real, name=name: read.append(name) or real(*given))
    config = configured("gpu=h100")
    estimates = [estimated(config), estimated({**config, "seed": 1})]
    show(estimates, config, Console(file=StringIO()))
    assert len(traced) == 1 and sorted(read) == ["rows_of"] * 2 + ["texts_of"] * 4


OWN_TUNING = """
from sddx.training.tuning import lora

def adapted(model, seed, *, size):
    return lora(model, seed, rank=size)

def half(model, seed):
    for place, weight in enumerate(model.parameters()):
        weight.requires_grad_(place % 2 == 0)
    return model
"""


def test_a_tuning_of_the_users_own_is_planned_by_what_it_makes(tmp_path: Path, monkeypatch) -> None:
    """Whatever it and its settings are called: the parameters that it trains, and whether they are an adapter's."""
    (tmp_path / "of_my_own.py").write_text(OWN_TUNING)
    monkeypatch.syspath_prepend(tmp_path)
    config = configured()
    usual = estimated(config)
    assert usual.trained == 161_280 and not usual.is_full
    large = usual.varied(tuning={"_target_": "of_my_own.adapted", "_partial_": True, "size": 64})
    assert large.trained == 8 * 161_280 and not large.is_full
    part = usual.varied(tuning={"_target_": "of_my_own.half", "_partial_": True})
    assert part.is_full and 0 < part.trained < part.pruned.parameters
    assert usual.trained == 161_280


OWN_RULES = """
def side_by_side(scores, count, remove):
    return tuple(range(1, 1 + remove))

def by_name(scores, count, remove):
    return tuple(scores["mine"][:remove])
"""


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sddx.compression.choose.contiguous", 1),
        ("sddx.compression.choose.last", 1),
        ("sddx.compression.choose.lowest", 4),
        ("rules_of_my_own.side_by_side", 1),
        ("rules_of_my_own.by_name", 4),  # which reads what no plan knows: the most there can be
    ],
)
def test_patches_stand_where_the_rule_cuts(rule: str, expected: int, tmp_path: Path, monkeypatch) -> None:
    """Asked of the rule itself, whatever it is called."""
    (tmp_path / "rules_of_my_own.py").write_text(OWN_RULES)
    monkeypatch.syspath_prepend(tmp_path)
    config = configured("pruning/patch=linear", "pruning.remove=4")
    pruning = {**config["pruning"], "choose": {"_target_": rule, "_partial_": True}}
    assert junctions(estimated({**config, "pruning": pruning})) == expected


def test_a_plan_finds_what_a_stage_costs_in_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage that is named has a folder, and one that is added is counted, without an edit of the plan."""
    folders = {path.parent.name for path in Path(stages.__file__).parent.glob("*/run.py")}
    assert folders == set(STAGES)

    def parts(estimate: Any) -> list[costs.Part]:
        return [estimate.part("merge", [estimate.config["seed"]], estimate.pruned, Effort(reading=1e12, read=7.0))]

    merge = SimpleNamespace(parts=parts, peak=lambda estimate: 90e9)
    known = modules("cost")
    monkeypatch.setattr("sddx.stages.cost.modules", lambda kind: {**known, "merge": merge})
    config, out = configured("gpu=h100"), StringIO()
    show([estimated(config)], config, Console(file=out, width=200))
    assert re.search(r"merge +│ +1 │ +0.00 M", out.getvalue())
    assert "merge does not fit on the H100 SXM. To make it fit" in out.getvalue()
