"""Laws of the teacher: the student's own weights, whole and without adapter, are the unpruned model."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, adapt, build, tokens

from sddx.compression.compressed import compress
from sddx.compression.remove import Removal
from sddx.data.encode import IGNORED, Encoded, collate
from sddx.errors import UserError
from sddx.evaluation.text import divergences, held_out
from sddx.models.anatomy import blocks, stacks
from sddx.models.outputs import head_of, run
from sddx.records import Batch, Cut
from sddx.students.teacher import SeparateTeacher, SharedTeacher, check_vocabularies

pytestmark = pytest.mark.fast

CUTS = [Cut.without({1, 2}, 5), Cut.without({0, 4}, 5)]


def batch():
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return Batch(ids, mask, ids)


def school(family, cut=CUTS[0], targets="all-linear"):
    """A pruned student with a random adapter, its shared teacher, and an untouched copy of the model."""
    model = build(family)
    separate = deepcopy(model)
    made = compress(model, [Removal(cut)])
    student = made.model = adapt(model, targets=targets)
    with student.disable_adapter():
        bare = student(tokens()).logits
    assert not torch.allclose(student(tokens()).logits, bare, atol=0.1)  # else none would see it left on
    return student, SharedTeacher(made), separate


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_teacher_equals_a_separate_one_bit_for_bit(family, cut):
    """Hidden states of every block and logits, though the student is in training mode and
    drops out; and the head works after the pass."""
    student, teacher, model = school(family, cut)
    separate = SeparateTeacher(model)
    for block in blocks(student):
        block.self_attn.attention_dropout = 0.5
    student.train()
    ours, theirs = teacher(batch(), states=True), separate(batch(), states=True)
    assert len(ours.states) == 5
    assert all(torch.equal(a, b) for a, b in zip(ours.states, theirs.states, strict=True))
    logits = model(batch().input_ids, attention_mask=batch().attention_mask).logits
    assert torch.equal(ours.head(ours.hidden), logits) and torch.equal(theirs.head(theirs.hidden), logits)
    adapted = run(student, batch().input_ids, batch().attention_mask)
    assert not torch.allclose(adapted.head(adapted.hidden), logits, atol=0.1)


def test_an_adapter_on_the_head_is_not_the_teachers():
    """Llama with lm_head among the targets: the teacher's head is the bare projection, after the pass too, where
    the student's own says something else of the same states."""
    student, teacher, model = school("llama", targets=["q_proj", "lm_head"])
    outputs = teacher(batch())
    logits = model(batch().input_ids, attention_mask=batch().attention_mask).logits
    assert not torch.allclose(head_of(student)(outputs.hidden), logits, atol=0.1)
    assert torch.equal(outputs.head(outputs.hidden), logits)


def test_a_scaled_head_is_scaled_for_the_teacher_too():
    """With an adapter on it, after the pass."""
    student, teacher, model = school("granite", targets=["q_proj", "lm_head"])
    outputs = teacher(batch())
    logits = model(batch().input_ids, attention_mask=batch().attention_mask).logits
    assert not torch.allclose(head_of(student)(outputs.hidden), logits, atol=0.1)
    assert torch.equal(outputs.head(outputs.hidden), logits)
    assert not torch.allclose(model.lm_head(outputs.hidden), logits)


def test_a_student_reads_text_once_for_both_measures():
    """With an adapter on the head too, which the teacher's pass switches off and on between its states and the
    student's logits: what each measure finds by itself, with padding and tokens without a label, in chunks that
    cut them."""
    student, teacher, _ = school("llama", targets=["q_proj", "lm_head"])
    rows = [Encoded("", [5, 9, 7, 6, 8, 4, 11], [IGNORED, 7, 6, 8, 4, 11, IGNORED], 5)]
    rows += [Encoded("", [12, 5], [5, IGNORED], 1)]
    batches = [collate(rows, 0)]
    found = held_out(student, batches, teacher, chunk=3)
    assert found["kl"] == pytest.approx(float(divergences(teacher, student, batches).mean()), rel=1e-6)
    assert found["perplexity"] == pytest.approx(held_out(student, batches)["perplexity"], rel=1e-6)
    assert found["kl"] > 1e-3


def state(student):
    """All that a teacher's pass touches."""
    config = student.get_base_model().config.to_dict()
    indices = [block.self_attn.layer_idx for block in blocks(student)]
    modes = [module.training for module in student.modules()]
    trainable = [weight.requires_grad for weight in student.parameters()]
    return config, indices, modes, trainable, list(student.state_dict()), [*map(id, student.modules())]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pass_leaves_the_student_as_it_was(family):
    """Outputs, config, indices, modes, trainable weights, names of weights."""
    student, teacher, _ = school(family)
    student.train()
    blocks(student)[0].eval()
    before, outputs = state(student), student(batch().input_ids).logits
    teacher(batch(), states=True)
    assert state(student) == before
    assert torch.equal(student(batch().input_ids).logits, outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_leaves_the_student_as_it_was(family):
    """Raised in the body of the context, and in a block that only the teacher has."""
    student, teacher, _ = school(family)
    before, outputs = state(student), student(batch().input_ids).logits
    with pytest.raises(KeyError), teacher.unpruned():
        assert len(blocks(student)) == 5
        raise KeyError
    handle = teacher.full.blocks[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher(batch())
    handle.remove()
    assert state(student) == before
    assert torch.equal(student(batch().input_ids).logits, outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unpruned_model_generates_inside_the_context(family):
    """With a cache: layer indices and per-layer lists are the full model's."""
    student, teacher, model = school(family)
    ids = tokens(2, 11)
    wanted = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    expected = model.generate(ids, **wanted)
    with teacher.unpruned() as unpruned:
        assert torch.equal(unpruned.generate(input_ids=ids, **wanted), expected)


def test_a_frozen_adapter_stays_frozen():
    """peft itself makes an adapter trainable when it switches it on again."""
    student, teacher, _ = school("llama")
    student.requires_grad_(False)
    teacher(batch())
    assert not any(weight.requires_grad for weight in student.parameters())


def test_depth_alone_would_drop_blocks():
    """Why depth and lists are swapped together: at the student's depth the last blocks drop out."""
    student, teacher, _ = school("llama")
    right = teacher(batch()).hidden
    with teacher.unpruned(), torch.no_grad():
        student.get_base_model().config.num_hidden_layers = 3
        wrong = run(student, batch().input_ids, batch().attention_mask).hidden
    assert not torch.allclose(right, wrong, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_sit_in_kept_blocks_only_and_removed_blocks_in_no_tree(family):
    """Neither parameters nor state dict of the student hold what was removed; nor does the optimiser."""
    student, teacher, _ = school(family)
    removed = [weight for block in (1, 2) for weight in teacher.full.blocks[block].parameters()]
    assert not any("lora" in name for block in (1, 2) for name, _ in teacher.full.blocks[block].named_parameters())
    assert not {*map(id, removed)} & {*map(id, student.parameters())}
    assert not any("layers.3" in name or "layers.4" in name for name in student.state_dict())
    assert all("lora" in name for name, weight in student.named_parameters() if weight.requires_grad)
    assert not any(weight.requires_grad for weight in removed)


def test_a_training_step_moves_the_adapter_and_not_the_teacher():
    """The student's gradients reach every adapter matrix with the teacher's pass in between; none reach the
    teacher."""
    student, teacher, _ = school("llama")
    student.train()
    before = teacher(batch()).hidden
    outputs = run(student, batch().input_ids, batch().attention_mask, states=True)
    target = teacher(batch())
    logits = target.head(target.hidden)
    assert not logits.requires_grad
    (outputs.head(outputs.hidden) - logits).square().mean().backward()
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    assert trained and all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in trained)
    torch.optim.SGD(trained, lr=0.1).step()
    assert torch.equal(teacher(batch()).hidden, before)


def test_a_shared_teacher_wants_frozen_weights():
    """Full fine-tuning would move it."""
    model = build("llama")
    made = compress(model, [Removal(CUTS[0])])
    with pytest.raises(ValueError, match="frozen"):
        SharedTeacher(made)
    model.requires_grad_(False)
    SharedTeacher(made)


def test_a_shared_teacher_wants_the_students_own_blocks():
    """The stack of another model, or another cut, is refused."""
    model = build("llama")
    made = compress(model, [Removal(CUTS[0])])
    model.requires_grad_(False)
    for wrong in ({"cut": CUTS[1]}, {"whole": stacks(build("llama"))}, {"whole": {}}):
        with pytest.raises(ValueError, match="not the blocks"):
            SharedTeacher(replace(made, **wrong))


def test_a_separate_teacher_is_frozen():
    model = build("llama").train()
    outputs = SeparateTeacher(model)(batch(), states=True)
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    assert not outputs.head(outputs.hidden).requires_grad


def test_other_vocabularies_are_refused_with_both_numbers():
    """Families pad their vocabularies differently, and a divergence over them would compare other words."""
    student, teacher = build("llama").config, build("llama").config
    check_vocabularies(student, teacher)
    teacher.vocab_size = 72
    with pytest.raises(UserError, match="64 entries and the teacher's 72"):
        check_vocabularies(student, teacher)
