"""Laws of the losses, of the layer map, and of applying the head in chunks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional

from sddx.errors import UserError
from sddx.records import Cut, Outputs
from sddx.training.head import token_loss
from sddx.training.losses import (
    cross_entropy,
    jsd_beta,
    kl_student_teacher,
    kl_teacher_student,
    squarehead,
    squarehead_token,
)
from sddx.training.objective import Distilled, Layerwise, Objective, Supervised, Totals, layer_pairs

pytestmark = pytest.mark.fast

ROWS, VOCABULARY, WIDTH = 13, 17, 8
DIVERGENCES = {
    "kl_teacher_student": kl_teacher_student,
    "kl_student_teacher": kl_student_teacher,
    "jsd_0": partial(jsd_beta, beta=0.0),
    "jsd_0.3": partial(jsd_beta, beta=0.3),
    "jsd_1": partial(jsd_beta, beta=1.0),
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3


@pytest.fixture
def student() -> torch.Tensor:
    return draw(ROWS, VOCABULARY, seed=1)


@pytest.fixture
def teacher() -> torch.Tensor:
    return draw(ROWS, VOCABULARY, seed=2)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_divergence_is_zero_only_at_the_teacher(name, temperature, student, teacher):
    """D(t, t) = 0 with zero gradient, and D(s, t) > 0 in every row."""
    divergence = partial(DIVERGENCES[name], temperature=temperature)
    same = teacher.clone().requires_grad_()
    value = divergence(same, teacher)
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(ROWS, dtype=torch.float64), atol=1e-13, rtol=0)
    torch.testing.assert_close(same.grad, torch.zeros_like(teacher), atol=1e-13, rtol=0)
    assert (divergence(student, teacher) > 1e-3).all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_equals_torch(temperature, student, teacher):
    """Both directions equal torch.nn.functional.kl_div(input, target) = KL(target || input), times T^2."""
    log_s, log_t = (functional.log_softmax(x / temperature, -1) for x in (student, teacher))
    forward = functional.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1) * temperature**2
    reverse = functional.kl_div(log_t, log_s, reduction="none", log_target=True).sum(-1) * temperature**2
    torch.testing.assert_close(kl_teacher_student(student, teacher, temperature=temperature), forward)
    torch.testing.assert_close(kl_student_teacher(student, teacher, temperature=temperature), reverse)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", [kl_teacher_student, kl_student_teacher, jsd_beta])
def test_gradients_are_those_of_differences(loss, temperature, student, teacher):
    """The derivative with respect to the student's logits, against finite differences, in float64."""
    logits = student.double().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher.double(), temperature=temperature), logits)


def test_cross_entropy_equals_torch_and_is_kl_to_a_certain_teacher(student):
    """-log p(label), which is the KL from a teacher that is certain of the label."""
    labels = torch.arange(ROWS) % VOCABULARY
    by_hand = -functional.log_softmax(student, -1)[torch.arange(ROWS), labels]
    certain = functional.one_hot(labels, VOCABULARY).double() * 1000
    torch.testing.assert_close(cross_entropy(student, labels), by_hand)
    torch.testing.assert_close(kl_teacher_student(student, certain), by_hand)


def test_half_precision_is_computed_in_float32(student, teacher):
    """bfloat16 logits give exactly the value of the same numbers in float32."""
    low_s, low_t = student.bfloat16(), teacher.bfloat16()
    for divergence in DIVERGENCES.values():
        value = divergence(low_s, low_t)
        assert value.dtype == torch.float32
        assert torch.equal(value, divergence(low_s.float(), low_t.float()))


def test_jsd_endpoints_symmetry_and_limits(student, teacher):
    """beta 0 is forward KL, 1 reverse KL, 0.5 symmetric; jsd / beta tends to the forward KL (GKD)."""
    assert torch.equal(jsd_beta(student, teacher, beta=0.0), kl_teacher_student(student, teacher))
    assert torch.equal(jsd_beta(student, teacher, beta=1.0), kl_student_teacher(student, teacher))
    half = jsd_beta(student, teacher, beta=0.5)
    torch.testing.assert_close(half, jsd_beta(teacher, student, beta=0.5))
    assert (half < torch.log(torch.tensor(2.0))).all()
    near = jsd_beta(student, teacher, beta=1e-7) / 1e-7
    torch.testing.assert_close(near, kl_teacher_student(student, teacher), rtol=1e-2, atol=0)
    near = jsd_beta(student, teacher, beta=1 - 1e-7) / 1e-7
    torch.testing.assert_close(near, kl_student_teacher(student, teacher), rtol=1e-2, atol=0)


def test_jsd_by_its_definition(student, teacher):
    """beta KL(t || m) + (1 - beta) KL(s || m) with probabilities, m = beta t + (1 - beta) s."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = 0.3 * p + 0.7 * q
    expected = 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1)
    torch.testing.assert_close(jsd_beta(student, teacher, beta=0.3), expected)


def test_jsd_refuses_a_beta_outside_its_range(student, teacher):
    """beta is a share."""
    with pytest.raises(ValueError, match="1.5"):
        jsd_beta(student, teacher, beta=1.5)


def test_squarehead_by_hand():
    """mean((S - T)^2) / (mean(T^2) + eps) over attended tokens and channels; padding does not count."""
    teacher = [torch.tensor([[[1.0, 3.0], [2.0, 4.0], [9.0, 9.0]]])]
    student = [torch.tensor([[[2.0, 3.0], [2.0, 6.0], [0.0, 0.0]]])]
    mask = torch.tensor([[1, 1, 0]])
    paper = squarehead(student, teacher, mask, epsilon=0.5)  # (1 + 4) / 4 over (1 + 9 + 4 + 16) / 4 + 0.5
    torch.testing.assert_close(paper, torch.tensor([1.25 / 8.0]))
    token = squarehead_token(student, teacher, mask, epsilon=0.5)  # 0.5 / (5 + .5) and 2 / (10 + .5)
    torch.testing.assert_close(token, torch.tensor([0.5 / 5.5, 2.0 / 10.5]))


def test_squarehead_fixed_points():
    """squarehead(t, t) = 0 and squarehead(0, t) = 1 per layer, up to epsilon; so for the token form."""
    layers = [draw(2, 5, WIDTH, seed=seed) for seed in (1, 2, 3)]
    nothing = [torch.zeros_like(layer) for layer in layers]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    assert squarehead(layers, layers, mask).eq(0).all()
    assert squarehead_token(layers, layers, mask).eq(0).all()
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(squarehead(nothing, layers, mask, epsilon=1e-12), ones)
    assert (squarehead(nothing, layers, mask) < 1).all()
    torch.testing.assert_close(squarehead_token(nothing, layers, mask, epsilon=1e-12), 3 * ones.new_ones(7))


def test_squarehead_ignores_padding_and_survives_none_attended():
    """More padding, of any content, changes nothing; nothing attended gives 0 with zero gradients."""
    teacher, student = draw(2, 5, WIDTH, seed=1), draw(2, 5, WIDTH, seed=2)
    mask = torch.ones(2, 5)
    padded = functional.pad(teacher, (0, 0, 0, 3), value=7.0), functional.pad(student, (0, 0, 0, 3))
    wide = functional.pad(mask, (0, 3))
    for loss in (squarehead, squarehead_token):
        expected = loss([student], [teacher], mask)
        torch.testing.assert_close(loss([padded[1]], [padded[0]], wide), expected)
        leaf = student.clone().requires_grad_()
        value = loss([leaf], [teacher], torch.zeros(2, 5)).sum()
        value.backward()
        assert value == 0 and leaf.grad.eq(0).all()


def test_squarehead_token_accumulates_and_the_paper_form_does_not():
    """Divided by the step's attended tokens, the token form does not depend on how the step is cut; the
    paper's form, averaged over micro-batches, does."""
    teacher, student = draw(4, 6, WIDTH, seed=1), draw(4, 6, WIDTH, seed=2)
    mask = (torch.arange(6)[None] < torch.tensor([6, 2, 4, 1])[:, None]).long()
    cut = Cut((0,), 1)

    def step(reduction: str, loss, parts: list[slice]) -> torch.Tensor:
        term = Layerwise(loss=loss, reduction=reduction)
        totals = Totals(labelled=0, attended=int(mask.sum()), micro_batches=len(parts))

        def outputs(states: torch.Tensor) -> Outputs:
            return Outputs(states, lambda rows: rows, (states,))

        shares = [term.value(outputs(student[p]), outputs(teacher[p]), mask[p], cut, totals) for p in parts]
        return sum(shares)

    whole, cut_up = [slice(0, 4)], [slice(0, 1), slice(1, 4)]
    torch.testing.assert_close(step("token", squarehead_token, whole), step("token", squarehead_token, cut_up))
    assert abs(step("micro_batch", squarehead, whole) - step("micro_batch", squarehead, cut_up)) > 1e-3


def test_layer_pairs_by_hand():
    """Blocks 2, 3 of 6 removed: student block 1 stands before the junction."""
    cut = Cut((0, 1, 4, 5), 6)
    assert layer_pairs(cut, "own") == [(0, 0), (1, 1), (2, 4), (3, 5)]
    assert layer_pairs(cut, "span_end") == [(0, 0), (1, 3), (2, 4), (3, 5)]
    assert layer_pairs(cut, "skip") == [(0, 0), (2, 4), (3, 5)]


def test_layer_pairs_of_several_spans_and_of_the_ends():
    """Two spans have two junctions; a cut at the start has none; one at the end leaves the last block
    without an own state after the final norm."""
    two = Cut((0, 2, 5, 6), 7)
    assert layer_pairs(two, "own") == [(0, 0), (1, 2), (2, 5), (3, 6)]
    assert layer_pairs(two, "span_end") == [(0, 1), (1, 4), (2, 5), (3, 6)]
    assert layer_pairs(two, "skip") == [(2, 5), (3, 6)]
    start = Cut((2, 3), 4)
    assert all(layer_pairs(start, junction) == [(0, 2), (1, 3)] for junction in ("own", "span_end", "skip"))
    end = Cut((0, 1), 4)
    assert layer_pairs(end, "own") == layer_pairs(end, "skip") == [(0, 0)]
    assert layer_pairs(end, "span_end") == [(0, 0), (1, 3)]


def test_keeping_all_pairs_each_block_with_itself():
    """No removal, no junction."""
    everything = Cut.without(set(), 4)
    for junction in ("own", "span_end", "skip"):
        assert layer_pairs(everything, junction) == [(block, block) for block in range(4)]


def test_objective_says_what_it_needs_and_refuses_mistakes():
    """Cross-entropy alone needs no teacher, logits one, layers its states too."""
    term = Supervised(loss=cross_entropy)
    plain = Objective(data="self", terms={"cross_entropy": term})
    kd = Objective(data="reference", terms={"kl": Distilled(loss=kl_teacher_student), "ce": term})
    layers = Objective(data="reference", terms={"squarehead": Layerwise(loss=squarehead)})
    assert [(o.needs_teacher, o.needs_states) for o in (plain, kd, layers)] == [
        (False, False), (True, False), (True, True),
    ]  # fmt: skip
    with pytest.raises(UserError, match="terms"):
        Objective(data="self", terms={})


TERMS = {
    "cross_entropy": Supervised(loss=cross_entropy),
    "kl": Distilled(loss=partial(kl_teacher_student, temperature=2.0), weight=0.5),
}
DIVISOR = 7


def through_head(hidden, weight, teacher, labels, chunk: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """The shares, and the gradients of their weighted sum with respect to hidden states and head."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    frozen = draw(VOCABULARY, WIDTH, seed=9)
    student = Outputs(hidden, lambda rows: rows @ weight.T, head_weights=(weight,))
    beside = Outputs(teacher, lambda rows: rows @ frozen.T)
    loss, shares = token_loss(TERMS, student, beside, labels, divisor=DIVISOR, chunk=chunk)
    assert not any(share.requires_grad for share in shares.values())
    torch.testing.assert_close(loss, sum(term.weight * shares[name] for name, term in TERMS.items()))
    (2 * loss).backward()
    return shares, hidden.grad / 2, weight.grad / 2


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 1000])
def test_head_in_chunks_equals_whole_logits(chunk):
    """Values and gradients equal torch's own losses on the whole logits, under any chunk size, whether or
    not it divides the number of labelled rows."""
    hidden, teacher, weight = draw(3, 6, WIDTH, seed=1), draw(3, 6, WIDTH, seed=2), draw(17, WIDTH, seed=3)
    labels = torch.randint(0, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(4))
    labels[0, :3] = labels[1, 2:] = -100
    sums, hidden_grad, weight_grad = through_head(hidden, weight, teacher, labels, chunk)

    leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (leaf @ head.T).flatten(0, 1)
    rows = labels.flatten() != -100
    ce = functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    target = functional.log_softmax(teacher.flatten(0, 1)[rows] @ draw(17, WIDTH, seed=9).T / 2, -1)
    log_student = functional.log_softmax(logits[rows] / 2, -1)
    kl = functional.kl_div(log_student, target, reduction="sum", log_target=True) * 4
    ((ce + kl / 2) / DIVISOR).backward()
    torch.testing.assert_close(sums, {"cross_entropy": ce.detach() / DIVISOR, "kl": kl.detach() / DIVISOR})
    torch.testing.assert_close(hidden_grad, leaf.grad)
    torch.testing.assert_close(weight_grad, head.grad)


def test_head_is_unchanged_by_padding():
    """Columns without a label, whatever the hidden states there, change no sum."""
    hidden, teacher, weight = draw(2, 4, WIDTH, seed=1), draw(2, 4, WIDTH, seed=2), draw(17, WIDTH, seed=3)
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
    expected, *_ = through_head(hidden, weight, teacher, labels, 4)
    wide = (functional.pad(x, (0, 0, 0, 5), value=float("inf")) for x in (hidden, teacher))
    hidden, teacher = wide
    padded, *_ = through_head(hidden, weight, teacher, functional.pad(labels, (0, 5), value=-100), 4)
    assert padded == expected


def test_all_masked_gives_zero_not_nan():
    """Without a label every sum and every gradient is 0."""
    hidden, teacher, weight = draw(2, 4, WIDTH, seed=1), draw(2, 4, WIDTH, seed=2), draw(17, WIDTH, seed=3)
    sums, hidden_grad, weight_grad = through_head(hidden, weight, teacher, torch.full((2, 4), -100), 4)
    assert all(value == 0 for value in sums.values())
    assert hidden_grad.eq(0).all() and weight_grad.eq(0).all()


def test_no_logits_larger_than_a_chunk_are_ever_made():
    """The head sees at most `chunk` rows at a time, each once, and labelled rows only."""
    seen = []
    hidden = draw(2, 10, WIDTH, seed=1).requires_grad_()
    labels = torch.arange(20).reshape(2, 10) % VOCABULARY
    labels[:, ::2] = -100
    weight = draw(VOCABULARY, WIDTH, seed=3)

    def head(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return rows @ weight.T

    terms = {"cross_entropy": TERMS["cross_entropy"]}
    token_loss(terms, Outputs(hidden, head), None, labels, divisor=1, chunk=4)[0].backward()
    assert sorted(seen) == [2, 4, 4]


def test_nothing_is_learned_where_nobody_asks():
    """Without gradients the shares are the same, and nothing is kept for a backward pass."""
    hidden, teacher, weight = draw(2, 4, WIDTH, seed=1), draw(2, 4, WIDTH, seed=2), draw(17, WIDTH, seed=3)
    labels = torch.arange(8).reshape(2, 4)
    expected, *_ = through_head(hidden, weight, teacher, labels, 3)
    frozen = Outputs(teacher, lambda rows: rows @ draw(VOCABULARY, WIDTH, seed=9).T)
    with torch.no_grad():
        student = Outputs(hidden, lambda rows: rows @ weight.T)
        loss, shares = token_loss(TERMS, student, frozen, labels, divisor=DIVISOR, chunk=3)
    assert shares == expected and not loss.requires_grad
