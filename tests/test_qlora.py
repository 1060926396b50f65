"""Laws of training on a base in 4 bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_training import EVERYTHING, examples, weights

import sddx
from sddx.compression.compressed import compress
from sddx.compression.remove import Removal
from sddx.errors import UserError
from sddx.models.load import four_bit, load_model
from sddx.records import Batch, Cut
from sddx.runtime import Runtime
from sddx.students.student import load_student, save_student
from sddx.students.teacher import SeparateTeacher, SharedTeacher
from sddx.training.fit import Fit
from sddx.training.tuning import qlora

bitsandbytes = pytest.importorskip("bitsandbytes")
CHECKPOINT = Path(sddx.__file__).parent / "tiny" / "checkpoint"
NF4 = {"type": "nf4", "double": True, "compute": "bfloat16"}
CUT = Cut.without({7, 8, 9}, 12)


def batch() -> Batch:
    ids = torch.randint(2, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.ones_like(ids), ids)


def test_the_blocks_are_held_in_four_bit_and_the_rest_is_not():
    """Half a byte a weight of every linear layer of the blocks, and the values that bitsandbytes itself gives."""
    plain, packed = load_model(CHECKPOINT), load_model(CHECKPOINT, quantization=NF4)
    layers = dict(plain.model.layers.named_modules())
    for name, module in packed.model.layers.named_modules():
        if isinstance(layers[name], torch.nn.Linear):
            assert isinstance(module, bitsandbytes.nn.Linear4bit) and module.weight.quant_state.nested
            assert 2 * module.weight.nbytes == layers[name].weight.numel()
            data, state = bitsandbytes.functional.quantize_4bit(
                layers[name].weight.data, quant_type="nf4", compress_statistics=True
            )
            assert (
                torch.equal(module.weight.data, data) and state.quant_type == module.weight.quant_state.quant_type
            )
    assert torch.equal(packed.lm_head.weight, plain.lm_head.weight)
    assert not any(w.requires_grad for w in packed.parameters() if w.dtype == torch.uint8)


def test_it_learns_beside_the_unpruned_model_in_four_bit(tmp_path):
    """The shared teacher is the whole model as it is loaded in 4 bit, bit for bit, before training and after it;
    only the adapter moves, and it is an ordinary one, which loads onto the base in its own dtype."""
    model = load_model(CHECKPOINT, quantization=NF4)
    made = compress(model, [Removal(CUT)])
    student = made.model = qlora(model, 0, quantization=NF4, rank=2)
    teacher, separate = SharedTeacher(made), SeparateTeacher(load_model(CHECKPOINT, quantization=NF4))
    expected = separate(batch()).hidden
    assert torch.equal(teacher(batch()).hidden, expected)
    assert not torch.equal(SeparateTeacher(load_model(CHECKPOINT))(batch()).hidden, expected)
    before, frozen = weights(student), {n: w.clone() for n, w in student.named_parameters() if not w.requires_grad}
    fit = Fit(budget="steps", steps=8, batch_size=8, learning_rate=1e-2, validate_every=1,
              gradient_checkpointing=True)  # fmt: skip
    given = examples(8), examples(4, seed=1)
    report = fit(student, teacher, EVERYTHING, CUT, *given, 1, 0, tmp_path, Runtime(quiet=True))
    after = weights(student)
    assert report["steps"] == 8 and all(not torch.equal(value, before[name]) for name, value in after.items())
    assert all(torch.equal(w, frozen[n]) for n, w in student.named_parameters() if not w.requires_grad)
    assert torch.equal(teacher(batch()).hidden, expected)

    save_student(made, tmp_path / "student", base="tiny")
    loaded = load_student(CHECKPOINT, tmp_path / "student", done=made.done, base="tiny").model
    stored = dict(loaded.named_parameters())
    assert all(torch.equal(stored[name], value) for name, value in after.items())
    assert loaded.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.float32


def test_what_cannot_be_is_refused(monkeypatch):
    """Another kind of number, a base that was loaded whole, and no bitsandbytes."""
    with pytest.raises(UserError, match="nf3.*nf4"):
        four_bit(**NF4 | {"type": "nf3"})
    with pytest.raises(ValueError, match="quantization"):
        qlora(load_model(CHECKPOINT), 0, quantization=NF4)
    monkeypatch.setattr("sddx.models.load.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"sddx\[qlora\]"):
        load_model(CHECKPOINT, quantization=NF4)
