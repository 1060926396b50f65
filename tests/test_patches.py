"""Laws of the junction: what each patch is exact for, that folding changes nothing, that the teacher has none."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from composing import composed, resolve
from families import VOCABULARY, adapt, build, call_blocks_by_name, tokens
from transformers import LlamaConfig

from sddx.compression.choose import PatchChoice
from sddx.compression.compressed import compress
from sddx.compression.fit import fit_patches
from sddx.compression.junction import Gap, Junction, attach, gaps, require_patch
from sddx.compression.patches import Diagonal, LightBlock, Linear, LinearFeedForward, LowRank, Mean
from sddx.compression.remove import Removal, apply_cut
from sddx.compression.soundness import prove, sliced_logits
from sddx.errors import UserError
from sddx.models.anatomy import blocks, set_blocks, stack
from sddx.records import Batch, Cut, Units
from sddx.runtime import Runtime
from sddx.stages.prune.check import _check_pruning
from sddx.students.student import load_student, save_student
from sddx.students.teacher import SeparateTeacher, SharedTeacher

CUT = Cut.without({1, 2}, 5)
WIDTH = 32
QUIET = Runtime(quiet=True)
FITS = {
    "mean": Mean,
    "diagonal": Diagonal,
    "low_rank": partial(LowRank, rank=4),
    "linear": Linear,
    "linear_ffn": LinearFeedForward,
    "block": partial(LightBlock, epochs=2, learning_rate=1e-3),
}


def batches(rows=24, length=16):
    ids = tokens(rows, length)
    mask = torch.ones_like(ids)
    mask[::3, 11:] = 0
    return [Batch(part, kept, part) for part, kept in zip(ids.split(8), mask.split(8), strict=True)]


def stream(count=200, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(fit, before, after):
    for x, y in zip(before.split(64), after.split(64), strict=True):
        fit.see(x, y)
    return fit.solve()


def test_mean_is_exact_for_a_constant_update():
    x, constant = stream(), stream(1, 7)
    patch = fitted(Mean(), x, x + constant)
    torch.testing.assert_close(patch(stream(5, 3)), stream(5, 3) + constant)


def test_diagonal_is_exact_for_a_scaling():
    x, factors = stream(), stream(1, 7).abs()
    patch = fitted(Diagonal(), x, x * factors)
    torch.testing.assert_close(patch(stream(5, 3)), stream(5, 3) * factors)


def test_linear_is_exact_for_a_linear_update():
    """And equal to an independent solver of the same ridge problem."""
    x, matrix = stream(), 0.1 * torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    patch = fitted(Linear(ridge=1e-12), x, x + x @ matrix)
    torch.testing.assert_close(
        patch(stream(5, 3)), stream(5, 3) @ (torch.eye(WIDTH) + matrix), atol=1e-8, rtol=1e-8
    )
    noisy = x @ matrix + stream(200, 9)
    strength = (0.3 * x.square().sum(0).mean()).sqrt() * torch.eye(WIDTH, dtype=torch.float64)
    zeros = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x, strength]), torch.cat([noisy, zeros])).solution
    torch.testing.assert_close(fitted(Linear(ridge=0.3), x, x + noisy).matrix.data, expected)


def test_low_rank_is_the_best_of_its_rank():
    """Exact for an update of that rank; never better than the full map, and better than cutting the map's own
    singular values, which does not see how the stream is spread."""
    x = stream() * torch.linspace(0.1, 3, WIDTH)
    low = 0.3 * torch.randn(WIDTH, 3, dtype=torch.float64) @ torch.randn(3, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(fitted(LowRank(rank=3, ridge=1e-12), x, x + x @ low)(x), x + x @ low)
    after = x + x @ (0.1 * torch.randn(WIDTH, WIDTH, dtype=torch.float64)) + stream(200, 9)
    errors = [(fitted(LowRank(rank=rank), x, after)(x) - after).norm() for rank in (2, 4, WIDTH)]
    whole = fitted(Linear(), x, after)
    assert errors[0] > errors[1] > errors[2]
    torch.testing.assert_close(errors[2], (whole(x) - after).norm())
    u, s, v = torch.linalg.svd(whole.matrix.data)
    assert errors[1] < (x + x @ (u[:, :4] * s[:4]) @ v[:4] - after).norm()


@pytest.mark.parametrize("fit", [Linear, partial(LowRank, rank=2), LinearFeedForward])
def test_a_regression_on_too_few_tokens_says_how_many_it_needs(fit):
    with pytest.raises(UserError, match="given 31 calibration tokens and needs 32"):
        fitted(fit(), stream(31), stream(31))


@pytest.mark.parametrize("fit", [Linear, partial(LowRank, rank=2), LinearFeedForward])
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_regression_that_cannot_be_solved_is_refused(fit, value):
    """On states that point one way alone, with next to no ridge; and on such as are no numbers."""
    x = torch.full((200, WIDTH), value, dtype=torch.float64)
    with pytest.raises(UserError, match=r"Raise pruning.patch.fit.ridge=1e-30"):
        fitted(fit(ridge=1e-30), x, x)


@pytest.mark.parametrize("kind", ["diagonal", "linear", "block"])
def test_blocks_that_are_called_by_name_are_patched_alike(kind, monkeypatch):
    """And run one after the other alike."""
    logits = []
    for named in (False, True):
        model = build("llama").requires_grad_(False)
        if named:
            call_blocks_by_name(monkeypatch, model)
        found, _ = fit_patches(model, CUT, FITS[kind], batches(), QUIET)
        sliced = sliced_logits(model, CUT, vocabulary=VOCABULARY)
        apply_cut(model, CUT)
        attach(model, CUT, Junction(found))
        logits.append((sliced, model(tokens()).logits))
    assert all(torch.equal(*pair) for pair in zip(*logits, strict=True))


def test_order_of_batches_and_padding_change_nothing():
    """What stands under the padding is not seen."""
    model, given = build("llama"), batches()
    other = [Batch(b.input_ids.where(b.attention_mask.bool(), 5), b.attention_mask, b.labels) for b in given[::-1]]
    first, _ = fit_patches(model, CUT, Linear, given, QUIET)
    second, _ = fit_patches(model, CUT, Linear, other, QUIET)
    for a, b in zip(first.values(), second.values(), strict=True):
        torch.testing.assert_close(a.matrix, b.matrix, atol=1e-5, rtol=1e-4)


def linear_span(model):
    """Blocks 1 and 2 made into one constant update: attention silent, feed-forward a bias."""
    for number in (1, 2):
        block = blocks(model)[number]
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            torch.nn.init.zeros_(linear.weight)
        block.mlp.down_proj.bias = torch.nn.Parameter(stream(1, number)[0].float())
    return model


@pytest.mark.parametrize("kind", ["mean", "linear_ffn", "linear"])
def test_a_patch_that_fits_exactly_gives_the_unpruned_logits(kind):
    """The mean of a constant update; a map of states is not exact for one."""
    model, ids = linear_span(build("llama")), tokens()
    expected = model(ids).logits
    found, unexplained = fit_patches(model, CUT, FITS[kind], batches(), QUIET)
    apply_cut(model, CUT)
    without = (model(ids).logits - expected).abs().max()
    attach(model, CUT, Junction(found))
    left = (model(ids).logits - expected).abs().max()
    assert (left < 1e-4) == (kind == "mean") and left < without
    assert (unexplained["blocks-1-3"] < 1e-9) == (kind == "mean")


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "gpt_neox", "opt", "mpt"])
def test_every_patch_leaves_less_unexplained_and_is_sound(name, kind):
    """Of the squared update, less than without a patch (1.0); sound with its modules in."""
    model = build(name).requires_grad_(False)
    whole = model(tokens()).logits
    found, unexplained = fit_patches(model, CUT, FITS[kind], batches(), QUIET)
    assert torch.equal(model(tokens()).logits, whole)
    # The ratio of magnitudes says nothing of signs, so that it may miss.
    assert 0 <= unexplained["blocks-1-3"] < (1.6 if kind == "diagonal" else 1)
    apply_cut(model, CUT)
    bare = model(tokens()).logits
    attach(model, CUT, Junction(found))
    assert not torch.allclose(model(tokens()).logits, bare, atol=1e-4)
    assert prove(model, vocabulary=VOCABULARY, again=None)["cached_tokens_equal"]


@pytest.mark.parametrize("kind", ["mean", "diagonal", "linear", "low_rank"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "gpt_neox_serial", "opt", "mpt"])
def test_removed_branches_can_be_patched_too(name, kind):
    cut = Cut((0, 1, 3, 4), 5, no_attention=(0, 3), no_feedforward=(1,))
    assert [gap.name for gap in gaps(cut)] == ["attention-0-1", "feedforward-1-2", "blocks-2-3", "attention-3-4"]
    model = build(name)
    found, unexplained = fit_patches(model, cut, FITS[kind], batches(), QUIET)
    assert len(unexplained) == 4 and all(share < 2 for share in unexplained.values())
    apply_cut(model, cut)
    attach(model, cut, Junction(found))
    assert prove(model, vocabulary=VOCABULARY, again=None)["cached_tokens_equal"]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt", "mpt"])
def test_a_mean_patch_of_a_constant_branch_is_exact(name):
    """The attention branch of block 0 made to write one vector: patched, the logits are those of the whole."""
    model, ids = build(name), tokens()
    out = {"gpt_neox": "attention.dense", "opt": "self_attn.out_proj", "mpt": "attn.out_proj"}
    linear = model.get_submodule(f"{_path(model)}.0.{out.get(name, 'self_attn.o_proj')}")
    torch.nn.init.zeros_(linear.weight)
    linear.bias = torch.nn.Parameter(stream(1, 4)[0].float())
    expected, cut = model(ids).logits, Cut(tuple(range(5)), 5, no_attention=(0,))
    found, _ = fit_patches(model, cut, Mean, batches(), QUIET)
    apply_cut(model, cut)
    attach(model, cut, Junction(found))
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


def _path(model):
    return next(name for name, module in model.named_modules() if module is blocks(model))


@pytest.mark.parametrize("removed", [{0, 1}, {3, 4}, {0, 2, 4}])
def test_patches_stand_at_either_end_and_in_several_gaps(removed):
    """Before the first block, after the last, and between; each with its own fit."""
    cut, model = Cut.without(removed, 5), build("llama")
    found, unexplained = fit_patches(model, cut, Linear, batches(), QUIET)
    assert len(unexplained) == len(cut.spans) and all(share < 1 for share in unexplained.values())
    apply_cut(model, cut)
    bare = model(tokens()).logits
    attached = attach(model, cut, Junction(found))
    assert len(attached) == len(cut.spans) and not torch.allclose(model(tokens()).logits, bare, atol=1e-3)


FOLDS = [("linear_ffn", name) for name in ("llama", "mistral", "qwen3", "phi3", "gpt_neox_serial", "opt", "mpt")]
FOLDS += [("mean", name) for name in ("llama", "gpt_neox", "opt")]


@pytest.mark.parametrize(("kind", "name"), FOLDS)
def test_folding_changes_no_logit_and_needs_no_module(kind, name, tmp_path):
    """In float64: the folded model equals the patched one, and a stock loader gives it back."""
    model = build(name).double()
    found, _ = fit_patches(model, CUT, FITS[kind], batches(), QUIET)
    ids, patched, folded = tokens(), deepcopy(model), model
    for whole, fold in ((patched, False), (folded, True)):
        apply_cut(whole, CUT)
        attached = attach(whole, CUT, Junction(found, fold=fold))
        assert bool(attached) != fold
    torch.testing.assert_close(folded(ids).logits, patched(ids).logits, atol=1e-9, rtol=1e-9)
    folded.save_pretrained(tmp_path)
    again = type(folded).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(ids).logits, folded(ids).logits, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("linear", "llama", "acts on the whole residual stream"),
        ("block", "llama", "acts on the whole residual stream"),
        ("diagonal", "llama", "acts on the whole residual stream"),
        ("mean", "qwen3", "no bias, and its config no setting"),
        ("mean", "gemma3", "a norm .post_feedforward_layernorm. stands between"),
        ("linear_ffn", "gemma3", "a norm .post_feedforward_layernorm. stands between"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(kind, name, reason):
    model = build(name)
    found, _ = fit_patches(model, CUT, FITS[kind], batches(), QUIET)
    apply_cut(model, CUT)
    with pytest.raises(UserError, match=reason):
        attach(model, CUT, Junction(found, fold=True))


@pytest.mark.parametrize("kind, fold", [("linear_ffn", False), ("linear_ffn", True), ("mean", True)])
def test_the_feed_forward_of_an_unknown_family_is_left_alone(kind, fold):
    """Granite has a layer of the usual name, and a factor between it and the stream."""
    model = build("granite")
    with pytest.raises(UserError, match="feed-forward branch of a granite model .* is not known"):
        require_patch("granite", Units("blocks", 5), PatchChoice(FITS[kind](), trained=False, fold=fold))
    with pytest.raises(UserError, match="feed-forward branch of a granite model .* is not known"):
        found, _ = fit_patches(model, CUT, FITS[kind], batches(), QUIET)
        apply_cut(model, CUT)
        attach(model, CUT, Junction(found, fold=fold))
    require_patch("granite", Units("blocks", 5), PatchChoice(Mean(), trained=False, fold=False))


@pytest.mark.parametrize("units, count", [("blocks", 12), ("sublayers", 24)])
def test_a_patch_needs_a_block_beside_it(units, count):
    with composed("pruning/patch=linear", "loss=none", "pruning=last", f"pruning.units={units}") as cfg:
        settings = resolve(cfg)
    settings["pruning"]["remove"] = count
    with pytest.raises(UserError, match=f"remove={count} leaves no block beside which a patch could stand"):
        _check_pruning(settings, LlamaConfig(num_hidden_layers=12))
    settings["pruning"]["remove"] = count - 1
    _check_pruning(settings, LlamaConfig(num_hidden_layers=12))


@pytest.mark.parametrize("kind", ["linear_ffn", "block"])
def test_a_patch_on_the_block_before_needs_one(kind):
    with pytest.raises(UserError, match="block 0 has none before it"):
        fit_patches(build("llama"), Cut.without({0, 1}, 5), FITS[kind], batches(), QUIET)
    with pytest.raises(UserError, match="where branches are removed there is none"):
        fit_patches(build("llama"), Cut(tuple(range(5)), 5, (2,)), FITS[kind], batches(), QUIET)


def test_a_feed_forward_map_needs_one_linear_layer_at_the_end():
    with pytest.raises(UserError, match="block 0 of a MixtralForCausalLM has none"):
        fit_patches(build("mixtral"), CUT, LinearFeedForward, batches(), QUIET)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("kind", FITS)
def test_the_teacher_is_without_patch_and_the_student_with(kind, fold, tmp_path):
    """Bit for bit the unpruned model in the student's weights, adapter on and all."""
    if fold and kind not in ("mean", "linear_ffn"):
        pytest.skip("cannot be folded")
    model, ids = build("llama"), tokens()
    separate = SeparateTeacher(deepcopy(model))
    found, _ = fit_patches(model, CUT, FITS[kind], batches(), QUIET)
    Junction(found, fold=fold).save(tmp_path)
    made = compress(model, [Removal(CUT), Junction.load(tmp_path)])
    student = made.model = adapt(model)
    before = student(ids).logits
    batch = Batch(ids, torch.ones_like(ids), ids)
    ours, theirs = SharedTeacher(made)(batch, states=True), separate(batch, states=True)
    assert torch.equal(ours.hidden, theirs.hidden)
    assert all(torch.equal(a, b) for a, b in zip(ours.states, theirs.states, strict=True))
    assert torch.equal(student(ids).logits, before)
    names = {id(weight) for weight in student.parameters()}
    assert all(id(weight) in names for weight in made.own.values())


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("kind", FITS)
def test_students_with_patches_come_back_from_disk(kind, adapted, tmp_path):
    """Also with patches that went on learning; and not onto another kind of patch."""
    base, ids = build("llama"), tokens()
    base.save_pretrained(tmp_path / "base")
    found, _ = fit_patches(base, CUT, FITS[kind], batches(), QUIET)
    for name, fits in (("patch", found), ("other", {Gap("blocks", 1, 3): Mean_of(1.0)})):
        (tmp_path / name).mkdir()
        Junction(fits).save(tmp_path / name)

    def loaded(folder, patch="patch"):
        done = [Removal(CUT), Junction.load(tmp_path / patch)]
        return load_student(tmp_path / "base", folder, done=done, base="key")

    student = loaded(None)
    student.model = adapt(student.model) if adapted else student.model
    with torch.no_grad():
        for weight in student.own.values():
            weight.add_(0.01 * torch.randn_like(weight))
    save_student(student, tmp_path / "student", base="key")
    again = loaded(tmp_path / "student")
    assert torch.equal(again.model(ids).logits, student.model(ids).logits)
    assert bool(again.whole) == adapted
    if kind != "mean":
        with pytest.raises(UserError, match="another cut or is of another kind"):
            loaded(tmp_path / "student", "other")


def Mean_of(value):
    return fitted(Mean(), stream(), stream() + value)


def test_training_a_patch_brings_it_nearer():
    """Layer stitching: epochs after the regression do not leave more unexplained; a light block learns."""
    model = build("llama").requires_grad_(False)
    shares = {}
    for epochs in (0, 30):
        fit = partial(LowRank, rank=2, epochs=epochs, learning_rate=1e-3)
        shares[epochs] = fit_patches(model, CUT, fit, batches(), QUIET)[1]["blocks-1-3"]
    assert shares[30] <= shares[0] * 1.001
    few, many = (
        fit_patches(model, CUT, partial(LightBlock, epochs=n, learning_rate=1e-3), batches(), QUIET)[1][
            "blocks-1-3"
        ]
        for n in (1, 30)
    )
    assert many < few


def test_blocks_keep_their_indices_with_a_light_block():
    model = build("llama")
    found, _ = fit_patches(model, CUT, FITS["block"], batches(), QUIET)
    full = apply_cut(model, CUT)
    attach(model, CUT, Junction(found))
    assert [block.self_attn.layer_idx for block in blocks(model)] == [0, 1, 2]
    assert blocks(model)[0] is not full.blocks[0]
    pruned = stack(model)
    set_blocks(model, full)
    assert [block.self_attn.layer_idx for block in blocks(model)] == [0, 1, 2, 3, 4]
    set_blocks(model, pruned)
    assert [block.self_attn.layer_idx for block in blocks(model)] == [0, 1, 2]
