"""Laws of importance by running: coalitions are models, values add up, estimators find what enumeration finds."""

from __future__ import annotations

import itertools
import math
from statistics import mean

import pytest
import torch
from families import build, call_blocks_by_name, tokens
from scipy.stats import t as t_quantile
from test_importance import subject

from sddx.compression.remove import apply_cut
from sddx.errors import UserError
from sddx.importance import coalitions
from sddx.importance.ablation import Greedy, LeaveOneOut, RandomSubnetworks, Shapley
from sddx.importance.coalitions import LogitDistance, Loss, Replay, TaskScore
from sddx.importance.score import score_units
from sddx.importance.taylor import Taylor, unit_weights
from sddx.models.anatomy import blocks, final_norm
from sddx.records import Batch, Units
from sddx.statistics.intervals import macro_average, standard_error, task_weights

pytestmark = pytest.mark.fast


def scored(name="llama", count=4, units="blocks", rows=6, lengths=(12, 7, 9)):
    ids = tokens(rows, 12)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, lengths[row % len(lengths)] :] = 0
    model = build(name, blocks=count).requires_grad_(False)
    return subject(model, [(ids[:4], mask[:4]), (ids[4:], mask[4:])], units)


def every(count):
    return list(itertools.product([True, False], repeat=count))


def hidden_of_cut(given, coalition, batch):
    """Independent reference: the cut applied to a fresh model."""
    model = build(given.model.config.model_type.removesuffix("_text"), blocks=given.units.total)
    removed = [number for number, present in enumerate(coalition) if not present]
    apply_cut(model, given.units.cut(removed))
    body = getattr(model, "gpt_neox", None) or model.model
    return body(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state


@pytest.mark.parametrize("units", ["blocks", "attention", "sublayers"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_a_coalition_is_the_model_with_the_rest_cut_out(name, units):
    """In any order of coalitions, with and without reuse; only the empty one has no model to compare with."""
    given = scored(name, 3, units)
    batch = given.batches[0]
    wanted = [c for c in every(len(given.units)) if any(c)]
    if units == "sublayers":
        wanted = wanted[:: len(wanted) // 12]
    with torch.no_grad():
        for reuse in (True, False):
            replay = Replay(given.model, given.units, reuse=reuse)
            replay.load(batch)
            for coalition in wanted[::2] + wanted[::-2]:
                if units == "sublayers" and not _has_block(given, coalition):
                    continue
                kept = batch.attention_mask.bool()
                expected = hidden_of_cut(given, coalition, batch)[kept]
                torch.testing.assert_close(replay.run(coalition)[kept], expected, atol=1e-5, rtol=1e-5)


def _has_block(given, coalition):
    pairs = zip(coalition[::2], coalition[1::2], strict=True)
    return any(a or b for a, b in pairs)


def test_blocks_that_are_called_by_name_are_valued_alike(monkeypatch):
    expected = Loss().of(scored(), every(4))
    given = scored()
    call_blocks_by_name(monkeypatch, given.model)
    assert torch.equal(Loss().of(given, every(4)), expected)


def test_nothing_shared_is_computed_twice():
    """Sixteen coalitions of four blocks in order run 1 + 2 + 4 + 8 blocks, not 32."""
    given, runs = scored(), []
    for place, block in enumerate(blocks(given.model)):
        block.register_forward_hook(lambda *_, place=place: runs.append(place))
    replay = Replay(given.model, given.units)
    replay.load(given.batches[0])
    runs.clear()
    for coalition in sorted(every(4), reverse=True):
        replay.run(coalition)
    assert sorted(runs) == [0] + [1] * 2 + [2] * 4 + [3] * 8


def test_loss_is_the_cross_entropy_of_each_sequence():
    given = scored()
    values = Loss(sequences=None, chunk=5).of(given, [(True,) * 4])
    losses = []
    for batch in given.batches:
        for row in range(len(batch.input_ids)):
            kept = batch.attention_mask[row].bool()
            logits = given.model(batch.input_ids[row, kept][None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, batch.labels[row, kept]))
    torch.testing.assert_close(values[0], -torch.stack(losses).double(), atol=1e-6, rtol=1e-5)
    assert Loss(sequences=5).of(given, [(True,) * 4]).shape == (1, 5)


def test_logit_distance_is_zero_for_the_whole_model():
    values = LogitDistance().of(scored(), [(True,) * 4, (True, False, True, True)])
    assert values[0].abs().max() == 0 and values[1].max() < 0


@pytest.mark.parametrize("metric", [
    LeaveOneOut(value=Loss()), LeaveOneOut(value=LogitDistance()), Shapley(value=Loss(), keep=0.0, orders=8),
    Shapley(value=Loss(), keep=0.5, orders=8), Taylor(),
])  # fmt: skip
@pytest.mark.parametrize("units", ["blocks", "attention", "sublayers"])
def test_a_unit_that_does_nothing_has_importance_zero(metric, units):
    """A block whose branches write nothing; by gradients, one without weights."""
    given = scored(units=units)
    block = blocks(given.model)[2]
    silent = list(block.parameters()) if isinstance(metric, Taylor) else [
        block.self_attn.o_proj.weight, block.mlp.down_proj.weight
    ]  # fmt: skip
    for weight in silent:
        torch.nn.init.zeros_(weight)
    mean_ = score_units(given, {"it": metric})["it"]["mean"]
    zero = [number for number in range(len(given.units)) if given.units.unit(number)[1] == 2]
    for number, value in enumerate(mean_):
        assert (abs(value) < 1e-6) == (number in zero)


def exact(given, value):
    """Shapley's value by enumerating all coalitions: weights |S|! (n - |S| - 1)! / n!."""
    count = len(given.units)
    worth = dict(zip(every(count), value.of(given, every(count)).mean(1), strict=True))
    found = [0.0] * count
    for coalition, total in worth.items():
        for unit in range(count):
            if coalition[unit]:
                size = sum(coalition) - 1
                weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
                without = tuple(present and number != unit for number, present in enumerate(coalition))
                found[unit] += weight * float(total - worth[without])
    return found, worth


@pytest.mark.parametrize("value", [Loss(), LogitDistance()])
def test_exact_shapley_lies_within_the_estimates_interval(value):
    """By enumeration over four blocks; and an order's values add up to the total change, to rounding."""
    given = scored()
    truth, worth = exact(given, value)
    found = Shapley(value=value, keep=0.0, orders=24).measure(given)
    assert found["orders"] == 24 and found["stable"] is None
    reach = t_quantile.ppf(1 - 0.05 / 8, 11)  # 95 % for all four at once, from twelve pairs
    orders = found["stderr_of"]["orders"]  # the texts are the same
    for expected, estimate, error in zip(truth, found["mean"], orders, strict=True):
        assert abs(expected - estimate) <= reach * error + 1e-9
    total = float(worth[True, True, True, True] - worth[False, False, False, False])
    assert sum(found["mean"]) == pytest.approx(total, rel=1e-9) == sum(truth)


@pytest.mark.parametrize("count", [10, 12])
def test_a_semivalue_only_meets_coalitions_that_keep_enough(count):
    """With 70 % kept at most three of ten or twelve blocks are gone; every unit is valued once an order."""
    given, seen = scored(count=count), []

    class Spy(Loss):
        def of(self, subject, coalitions):
            seen.extend(coalitions)
            return super().of(subject, coalitions)

    found = Shapley(value=Spy(), keep=0.7, orders=4).measure(given)
    assert min(sum(coalition) for coalition in seen) == count - 3 >= 0.7 * count and max(map(sum, seen)) == count
    assert len(set(seen)) == len(seen) and len(found["mean"]) == count


def test_shapley_stops_when_the_lowest_units_are_known():
    """One block that does nothing is told from blocks that matter at once."""
    given = scored(count=6)
    for weight in (blocks(given.model)[2].self_attn.o_proj.weight, blocks(given.model)[2].mlp.down_proj.weight):
        torch.nn.init.zeros_(weight)
    found = Shapley(value=LogitDistance(), keep=0.0, orders=200, lowest=1).measure(given)
    assert found["orders"] < 200 and found["stable"] >= 0.95
    assert min(range(6), key=found["mean"].__getitem__) == 2


def test_leave_one_out_is_the_loss_of_a_cut_model():
    given = scored()
    found = LeaveOneOut(value=Loss()).measure(given)["mean"]
    values = Loss().of(given, [(True,) * 4, (True, True, False, True)]).mean(1)
    assert found[2] == pytest.approx(float(values[0] - values[1]))


def test_the_released_offset_changes_no_order():
    """A leave-one-out difference up to an offset and a factor that all units share (docs/sources.md)."""
    plain = LeaveOneOut(value=Loss()).measure(scored())["mean"]
    released = LeaveOneOut(value=Loss(), released=True).measure(scored())["mean"]
    ratio = [(released[0] - r) / (plain[0] - p) for p, r in zip(plain[1:], released[1:], strict=True)]
    assert ratio == pytest.approx([4 / 3] * 3)
    assert mean(released) == pytest.approx(0, abs=1e-9)
    losses = (-Loss().of(scored(), [tuple(n != unit for n in range(4)) for unit in range(4)]).mean(1)).tolist()
    assert released[2] == pytest.approx(losses[2] - mean(losses[:2] + losses[3:]))


def test_random_subnetworks_are_drawn_for_each_text():
    """The mean value with the unit minus that without, over all texts' own draws, by a plain loop."""
    given, drawn, worth = scored(), [], []

    class Spy(Loss):
        def of(self, subject, coalitions):
            values = super().of(subject, coalitions)
            drawn.extend(coalitions)
            worth.extend(values[:, 0].tolist())
            return values

    found = RandomSubnetworks(value=Spy(), count=5, keep=0.5, seed=1).measure(given)
    assert len(drawn) == 5 * 6 and len(set(drawn)) > 5 and all(sum(coalition) == 2 for coalition in drawn)
    for unit in range(4):
        has = [value for value, coalition in zip(worth, drawn, strict=True) if coalition[unit]]
        lacks = [value for value, coalition in zip(worth, drawn, strict=True) if not coalition[unit]]
        assert found["mean"][unit] == pytest.approx(mean(has) - mean(lacks))
        shares = []  # what each text adds to the two means, less what its number of subnetworks lets expect
        for text in range(6):
            rows = range(5 * text, 5 * text + 5)
            with_ = sum(worth[row] - mean(has) for row in rows if drawn[row][unit]) / len(has)
            shares.append(
                with_ - sum(worth[row] - mean(lacks) for row in rows if not drawn[row][unit]) / len(lacks)
            )
        assert found["stderr"][unit] == pytest.approx(math.sqrt(6 / 5 * sum(share**2 for share in shares)))
    with pytest.raises(UserError, match="Raise count"):
        RandomSubnetworks(value=Loss(sequences=1), count=1).measure(given)
    with pytest.raises(UserError, match="value must be Loss"):
        RandomSubnetworks(value=TaskScore(tasks=["tiny_facts"], limit=4))


def test_greedy_removes_the_least_missed_again_and_again():
    """Against a plain loop over cut models; what is left stands in the order of the last round."""
    given = scored(count=5)
    found = Greedy(value=Loss(), until=3).measure(given)
    gone = []
    for _ in range(3):
        rest = [unit for unit in range(5) if unit not in gone]
        worth = {u: float(Loss().of(given, [tuple(n not in (*gone, u) for n in range(5))]).mean()) for u in rest}
        left = sorted(rest, key=worth.__getitem__, reverse=True)
        gone.append(left[0])
    assert sorted(range(5), key=found["mean"].__getitem__) == gone + left[1:] and len(found["costs"]) == 3
    with pytest.raises(UserError, match="until=5, but there are 5 units"):
        Greedy(value=Loss(), until=5).measure(given)


def test_taylor_is_gradient_times_weight():
    """Against autograd on each sequence alone; the model is left as it was."""
    given = scored()
    found = Taylor().measure(given)
    assert not any(weight.requires_grad or weight.grad is not None for weight in given.model.parameters())
    total = torch.zeros(4)
    for batch in given.batches:
        for row in range(len(batch.input_ids)):
            model = build("llama", blocks=4)
            kept = batch.attention_mask[row].bool()
            logits = model(batch.input_ids[row, kept][None]).logits[0]
            torch.nn.functional.cross_entropy(logits, batch.labels[row, kept]).backward()
            total += torch.stack(
                [sum((w * w.grad).abs().sum() for w in b.parameters()) for b in model.model.layers]
            )
    torch.testing.assert_close(torch.tensor(found["mean"]), (total / 6).detach(), rtol=1e-4, atol=1e-6)


def test_taylor_wants_gradients_and_labels():
    given = scored()
    blocks(given.model)[0].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(2, 2).to(torch.int8), False)
    with pytest.raises(UserError, match="a quantised model has none"):
        Taylor().measure(given)
    single = Batch(tokens(2, 1), torch.ones(2, 1), torch.full((2, 1), -100))
    one = subject(build("llama"), [(tokens(2, 12), torch.ones(2, 12))])
    alone = type(one)(one.model, None, one.units, [single], one.runtime)
    with pytest.raises(UserError, match="no token after the first"):
        Taylor().measure(alone)
    with pytest.raises(UserError, match="needs labels"):
        LeaveOneOut(value=Loss()).measure(alone)


def test_weights_of_branches_and_blocks():
    """Both branches together are the block."""
    model = build("gemma3")
    whole = {id(weight) for weight in unit_weights(model, Units("blocks", 5), 1)}
    halves = [{id(w) for w in unit_weights(model, Units("sublayers", 5), number)} for number in (2, 3)]
    assert halves[0] | halves[1] == whole and not halves[0] & halves[1]


def test_a_task_without_selection_items_is_refused():
    """And report items only under the name of an oracle."""
    with pytest.raises(UserError, match="'gsm8k' has no selection items"):
        TaskScore(tasks=["gsm8k"], limit=None)
    value = TaskScore(tasks=["tiny_facts"], limit=4, primary={"tiny_facts": "acc_norm,none", "mmlu": "acc,none"})
    assert value.tasks == ["tiny_facts_selection"] and value.primary["tiny_facts_selection"] == "acc_norm,none"
    assert TaskScore(tasks=["tiny_facts"], limit=4, oracle=True).tasks == ["tiny_facts"]


def record(scores, part_of, clusters=None):
    clusters = clusters or [None] * len(scores)
    samples = [{"score": s, "cluster": c} for s, c in zip(scores, clusters, strict=True)]
    return {"part_of": part_of, "samples": samples}


def test_tasks_count_equally_and_clusters_are_one_draw():
    """The mean is the report's, over reported tasks and their parts; of one task the error is the report's too, and
    where nothing is shared each item is its own draw."""
    dice = torch.Generator().manual_seed(0)
    scores = {task: torch.rand(size, generator=dice).tolist() for task, size in (("a", 7), ("b", 40), ("c", 3))}
    parts = {"a": "one", "b": "two", "c": "two"}
    found = coalitions._of_tasks({task: record(each, parts[task]) for task, each in scores.items()})
    expected = macro_average(scores, task_weights(list(scores), parts))
    assert len(found) == 50 and float(found.mean()) == pytest.approx(expected)
    shared = ["abcde"[place % 5 if place < 30 else 0] for place in range(40)]
    found = coalitions._of_tasks({"b": record(scores["b"], "b", shared)})
    assert len(found) == 5 and float(found.mean()) == pytest.approx(mean(scores["b"]))
    assert float(found.std() / 5**0.5) == pytest.approx(standard_error(scores["b"], shared))
    alone = coalitions._of_tasks({"b": record(scores["b"], "b")})
    torch.testing.assert_close(alone, torch.tensor(scores["b"]).double(), rtol=0, atol=1e-15)


def test_shapley_settings_that_make_no_sense_are_refused():
    for wrong in ({"keep": 1.0}, {"orders": 5}, {"orders": 2}):
        with pytest.raises(UserError, match="shapley: keep="):
            Shapley(value=Loss(), **wrong)


def test_the_final_norm_is_applied_once():
    given = scored()
    replay = Replay(given.model, given.units)
    replay.load(given.batches[0])
    empty = replay.run((False,) * 4)
    embedded = given.model.model.embed_tokens(given.batches[0].input_ids)
    assert torch.equal(empty, final_norm(given.model)(embedded))


def test_coalitions_leave_the_model_as_it_was():
    given = scored(units="sublayers")
    before = given.model(tokens()).logits
    Shapley(value=Loss(), orders=4).measure(given)
    assert torch.equal(given.model(tokens()).logits, before)
    assert coalitions.blocks(given.model)[0].self_attn.layer_idx == 0
