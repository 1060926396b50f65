"""Laws of importance: distances by hand, and nothing but the tokens matters."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from families import FAMILIES, build, tokens

from sddx.errors import UserError
from sddx.importance.metrics import angular_distance, block_influence, norm_ratio, update_norm
from sddx.importance.score import Subject, score_units
from sddx.models.anatomy import blocks, final_norm
from sddx.models.outputs import block_states
from sddx.records import Batch, Units
from sddx.runtime import Runtime

pytestmark = pytest.mark.fast

BOTH = [torch.float64, torch.float32]
METRICS = [
    partial(angular_distance, tokens="last"), partial(angular_distance, tokens="all"), block_influence, norm_ratio,
    *(partial(update_norm, order=order, relative=relative) for order in (1, 2) for relative in (True, False)),
]  # fmt: skip


def subject(model, batches, units="blocks", runtime=None):
    """Batches of (ids, mask) as a subject of scoring, every token's follower its label."""
    labelled = []
    for ids, mask in batches:
        labels = torch.where(mask.bool(), ids, -100).roll(-1, 1)
        labels[:, -1] = -100
        labelled.append(Batch(ids, mask, labels))
    return Subject(model, None, Units(units, len(blocks(model))), labelled, runtime or Runtime(quiet=True))


def score_blocks(model, batches, metric, units="blocks", runtime=None):
    return score_units(subject(model, batches, units, runtime), {"it": metric})["it"]


def one_token(*vectors, dtype=torch.float64):
    """States [1, 1, width], one for each vector."""
    return [torch.tensor(vector, dtype=dtype)[None, None] for vector in vectors], torch.ones(1, 1)


@pytest.mark.parametrize("dtype", BOTH)
def test_two_dimensional_example_by_hand(dtype):
    """(1, 0) to (1, 1) is a quarter of pi, to (0, 3) a half, to (-2, 0) the whole; lengths do not matter."""
    states, mask = one_token([1.0, 0.0], [5.0, 5.0], [0.0, 3.0], [-2.0, 0.0], dtype=dtype)
    distance = angular_distance(states, mask, tokens="last")[0]
    by_hand = torch.tensor([[0, 1, 2, 4], [1, 0, 1, 3], [2, 1, 0, 2], [4, 3, 2, 0]], dtype=dtype) / 4
    torch.testing.assert_close(distance, by_hand)
    root = math.sqrt(0.5)
    by_hand = torch.tensor([1 - root, 1 - root, 1.0], dtype=dtype)
    torch.testing.assert_close(block_influence(states, mask)[0], by_hand)


def test_metrics_equal_their_definitions():
    """arccos(cosine) / pi and 1 - cosine, averaged over tokens, by torch's own cosine in float64."""
    torch.manual_seed(0)
    states = list(torch.randn(5, 3, 7, 11, dtype=torch.float64))
    mask = torch.ones(3, 7)
    for i in range(5):
        for j in range(5):
            cosine = torch.nn.functional.cosine_similarity(states[i], states[j], dim=-1)
            angle = torch.arccos(cosine.clamp(-1, 1)) / torch.pi
            every = angular_distance(states, mask, tokens="all")[:, i, j]
            torch.testing.assert_close(every, angle.mean(1), atol=2e-8, rtol=0)  # arccos near 1 loses half
            final = angular_distance(states, mask, tokens="last")[:, i, j]
            torch.testing.assert_close(final, angle[:, -1], atol=2e-8, rtol=0)
            if j == i + 1:
                torch.testing.assert_close(block_influence(states, mask)[:, i], 1 - cosine.mean(1))


@pytest.mark.parametrize("dtype", [*BOTH, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_equal_states_have_distance_exactly_zero(metric, dtype):
    """Where arccos of a rounded cosine would give 3e-4 in float32. Equal zero vectors included."""
    torch.manual_seed(0)
    state = torch.randn(4, 9, 129).to(dtype)
    state[0, -1] = 0
    assert metric([state, state.clone(), state.clone()], torch.ones(4, 9)).abs().max() == 0


def test_small_angles_survive_float32():
    """A turn of 1e-5 is measured to a per cent, a thousandth of what arccos could resolve."""
    angle = 1e-5
    states, mask = one_token([1.0, 0.0], [math.cos(angle), math.sin(angle)], dtype=torch.float32)
    measured = angular_distance(states, mask, tokens="last")[0, 0, 1] * torch.pi
    assert abs(measured.item() / angle - 1) < 0.01


@pytest.mark.parametrize("dtype", BOTH)
def test_a_zero_vector_is_orthogonal_to_everything_else(dtype):
    """Cosine 0 by convention, and no NaN."""
    states, mask = one_token([0.0, 0.0], [1.0, 2.0], [0.0, 0.0], dtype=dtype)
    distance = angular_distance(states, mask, tokens="last")[0]
    torch.testing.assert_close(distance, torch.tensor([[0, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0]], dtype=dtype))
    torch.testing.assert_close(block_influence(states, mask)[0], torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("metric", METRICS)
def test_what_stands_under_padding_does_not_matter(metric):
    """Not even NaN, on either side; the last token is the last that is no padding."""
    torch.manual_seed(0)
    states = list(torch.randn(4, 2, 6, 5, dtype=torch.float64))
    plain = metric(states, torch.ones(2, 6))
    rubbish = torch.full((2, 3, 5), torch.nan, dtype=torch.float64)
    right = metric([torch.cat([s, rubbish], 1) for s in states], torch.tensor([[1] * 6 + [0] * 3] * 2))
    left = metric([torch.cat([rubbish, s], 1) for s in states], torch.tensor([[0] * 3 + [1] * 6] * 2))
    torch.testing.assert_close(right, plain)
    torch.testing.assert_close(left, plain)


def padded(ids, lengths, side):
    """Token ids and mask; each row keeps its first `lengths` tokens, padded to the longest of them."""
    width = max(lengths)
    rows = torch.full((len(lengths), width), 1)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        rows[row, place], mask[row, place] = ids[row, :length], 1
    return rows, mask


def close(scores, others):
    for part in ("mean", "stderr"):
        torch.testing.assert_close(torch.tensor(scores[part]), torch.tensor(others[part]), atol=1e-5, rtol=1e-4)
    assert scores["sequences"] == others["sequences"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_batches_and_padding_do_not_matter(family, metric):
    """One by one without padding, reversed, or in batches padded on either side: the same scores."""
    model, ids, lengths = build(family), tokens(5, 12), [12, 5, 9, 3, 7]
    alone = [(ids[row : row + 1, :length], torch.ones(1, length)) for row, length in enumerate(lengths)]
    scores = score_blocks(model, alone, metric)
    close(scores, score_blocks(model, alone[::-1], metric))
    for side in ("right", "left"):
        for cuts in ([5], [2, 3]):
            start, batches = 0, []
            for size in cuts:
                batches.append(padded(ids[start : start + size], lengths[start : start + size], side))
                start += size
            close(scores, score_blocks(model, batches, metric))


def test_mean_and_standard_error_are_those_of_the_sequences():
    """Against torch's own mean and deviation over all values at once."""
    model, ids = build("llama"), tokens(6, 8)
    with block_states(model) as states, torch.no_grad():
        model.model(input_ids=ids)
    values = angular_distance(states, torch.ones_like(ids), tokens="last").double()
    scores = score_blocks(model, [(row[None], torch.ones(1, 8)) for row in ids], METRICS[0])
    torch.testing.assert_close(torch.tensor(scores["mean"]).double(), values.mean(0), atol=1e-6, rtol=0)
    error = values.std(0) / math.sqrt(6)
    torch.testing.assert_close(torch.tensor(scores["stderr"]).double(), error, atol=1e-6, rtol=0)
    assert scores["sequences"] == 6


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_an_identity_block_has_distance_and_influence_zero(family):
    """A block whose two branches write nothing passes its input through; its neighbours do not."""
    model = build(family)
    with torch.no_grad():
        blocks(model)[2].self_attn.o_proj.weight.zero_()
        blocks(model)[2].mlp.down_proj.weight.zero_()
    batches = [(tokens(), torch.ones(3, 12))]
    for tokens_ in ("last", "all"):
        mean = score_blocks(model, batches, partial(angular_distance, tokens=tokens_))["mean"]
        assert mean[2][3] == 0 and mean[1][2] > 0.01 and mean[3][4] > 0.01
    mean = score_blocks(model, batches, block_influence)["mean"]
    assert mean[2] == 0 and min(mean[1], mean[3]) > 1e-3
    for metric in METRICS[3:]:
        mean = score_blocks(model, batches, metric)["mean"]
        assert mean[2] == 0 and min(mean[1], mean[3]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_candidate_is_scored_before_the_final_norm(family):
    """By hand-fed blocks, and different from what `hidden_states[-1]` gives. The first block is a
    candidate too."""
    model, ids = build(family), tokens()
    with torch.no_grad():
        final_norm(model).weight.copy_(torch.randn(32))
        seen = model(ids, output_hidden_states=True).hidden_states
    caught = []
    handle = final_norm(model).register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    model(ids)
    handle.remove()
    mean = torch.tensor(score_blocks(model, [(ids, torch.ones_like(ids))], METRICS[0])["mean"])
    right = angular_distance([*seen[:-1], caught[0]], torch.ones_like(ids), tokens="last").mean(0)
    wrong = angular_distance(seen, torch.ones_like(ids), tokens="last").mean(0)
    torch.testing.assert_close(mean, right.float(), atol=1e-6, rtol=0)
    assert (mean[:-1, -1] - wrong[:-1, -1]).abs().min() > 1e-3
    assert mean.shape == (6, 6) and mean[0, 1] > 0


def test_blocks_that_return_tuples_are_read_alike():
    """A tuple's first entry is the state, a bare tensor's first entry is a batch row."""
    model, batches = build("llama"), [(tokens(), torch.ones(3, 12))]
    with block_states(model) as states, torch.no_grad():
        model.model(input_ids=tokens())
    norm = final_norm(model)
    for block in blocks(model):
        block.register_forward_hook(lambda module, args, output: (output,))
        block.register_forward_pre_hook(lambda module, args: args[0] if isinstance(args[0], tuple) else None)
    norm.register_forward_pre_hook(lambda module, args: args[0] if isinstance(args[0], tuple) else None)
    mean = torch.tensor(score_blocks(model, batches, METRICS[0])["mean"])
    expected = angular_distance(states, torch.ones(3, 12), tokens="last").mean(0)
    torch.testing.assert_close(mean, expected, atol=1e-6, rtol=0)


def test_progress_counts_sequences_and_no_hook_stays():
    model, seen = build("llama"), []
    batches = [(tokens(3), torch.ones(3, 12)), (tokens(2), torch.ones(2, 12))]
    score_blocks(model, batches, METRICS[0], runtime=Runtime(watch=seen.append))
    assert seen[-1]["total"] == 5
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks(model))


def test_metrics_together_are_the_metrics_alone():
    """One pass for all of them."""
    model, batches = build("llama"), [(tokens(5), torch.ones(5, 12))]
    metrics = {str(number): metric for number, metric in enumerate(METRICS)}
    together = score_units(subject(model, batches), metrics)
    assert list(together) == list(metrics)
    for name, metric in metrics.items():
        assert together[name] == score_blocks(model, batches, metric)


@pytest.mark.parametrize("order", [1, 2])
def test_update_norms_by_hand(order):
    """(3, 4) to (3, 8) is an update of 4, beside an input of 7 or 5; lengths 5 and sqrt(73)."""
    states, mask = one_token([3.0, 4.0], [3.0, 8.0])
    assert update_norm(states, mask, order=order, relative=False).item() == 4
    assert update_norm(states, mask, order=order).item() == pytest.approx(4 / (7 if order == 1 else 5))
    assert norm_ratio(states, mask).item() == pytest.approx(math.log(math.sqrt(73) / 5))


def test_branches_are_scored_at_their_own_place():
    """Attention from the block's input to the sum, feed-forward from there on; the chain of both is one of
    twice as many units, whose distances over two units are those of blocks."""
    model, batches = build("llama"), [(tokens(4), torch.ones(4, 12))]
    chain = torch.tensor(score_blocks(model, batches, METRICS[1], "sublayers")["mean"])
    whole = torch.tensor(score_blocks(model, batches, METRICS[1])["mean"])
    assert chain.shape == (11, 11)
    torch.testing.assert_close(chain[::2, ::2], whole)
    for kind, first in (("attention", 0), ("feedforward", 1)):
        alone = torch.tensor(score_blocks(model, batches, METRICS[1], kind)["mean"])
        torch.testing.assert_close(alone, chain.diagonal(1)[first::2])


def test_parallel_branches_are_scored_on_the_same_input():
    """GPT-NeoX: with the attention branch silent, the feed-forward branch's influence is the block's own."""
    model, batches = build("gpt_neox"), [(tokens(4), torch.ones(4, 12))]
    with torch.no_grad():
        for block in blocks(model):
            block.attention.dense.weight.zero_()
            block.attention.dense.bias.zero_()
    scores = score_blocks(model, batches, block_influence, "sublayers")["mean"]
    assert len(scores) == 10 and max(scores[::2]) < 1e-9
    expected = torch.tensor(score_blocks(model, batches, block_influence)["mean"])
    torch.testing.assert_close(torch.tensor(scores[1::2]), expected, rtol=1e-4, atol=1e-7)


def test_one_sequence_has_no_standard_error():
    assert score_blocks(build("llama"), [(tokens(1), torch.ones(1, 12))], METRICS[0])["stderr"] is None


def test_no_sequences_is_the_users_mistake():
    with pytest.raises(UserError, match="given 0 calibration sequences and needs 1"):
        score_blocks(build("llama"), [], METRICS[0])


@pytest.mark.parametrize("metric", METRICS)
def test_a_score_that_is_not_finite_is_refused(metric):
    """A sequence without tokens, or a model that overflows."""
    ids, mask = tokens(2), torch.ones(2, 12)
    model = build("llama")
    with torch.no_grad():
        blocks(model)[0].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="not finite"):
        score_blocks(model, [(ids, mask)], metric)
    mask[1] = 0
    with pytest.raises(UserError, match="not finite"):
        score_blocks(build("llama"), [(ids, mask)], metric)


def test_unknown_tokens_option_is_refused():
    with pytest.raises(UserError, match="'first'"):
        angular_distance(*one_token([1.0], [1.0]), tokens="first")
