"""Laws of what is done to a model: it composes, can be undone, holds after every step, and comes back from disk. A
mask of weights, written here alone, stands for the kinds that are to come."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from composing import composed, resolve
from families import adapt, build, tokens
from safetensors.torch import load_file, save_file

import sddx
from sddx.compression import kinds
from sddx.compression.compressed import Compression, compress
from sddx.compression.fit import fit_patches
from sddx.compression.junction import Junction
from sddx.compression.patches import Mean
from sddx.compression.remove import Removal
from sddx.data.shards import write_rows
from sddx.models.anatomy import blocks
from sddx.models.load import load_model
from sddx.records import Artifact, Batch, Cut, Example
from sddx.runtime import Runtime
from sddx.stages.train.run import train
from sddx.students.student import load_student, save_student
from sddx.students.teacher import SharedTeacher

CUT = Cut.without({1, 2}, 5)
BASE = Artifact("model", "tiny", Path(sddx.__file__).parent / "tiny" / "checkpoint")
HOW = {"dtype": "float32", "attention": "sdpa"}
FILE = "mask.safetensors"


class Mask(Compression):
    """Every second column of one linear layer of the first block is zero."""

    def __init__(self, folder=None):
        self.dense = None

    def apply(self, made):
        self.dense = weight(made).detach().clone()
        self.after_step(made)

    @contextmanager
    def undone(self, made):
        with torch.no_grad():
            weight(made).copy_(self.dense)
        try:
            yield
        finally:
            self.after_step(made)

    def after_step(self, made):
        with torch.no_grad():
            weight(made)[:, ::2] = 0

    def keep(self, made, folder):
        save_file({"dense": self.dense}, folder / FILE)

    def restore(self, made, folder):
        self.dense = load_file(folder / FILE)["dense"]


def weight(made):
    """What is masked: [width, feed-forward width]."""
    projection = blocks(made.model)[0].mlp.down_proj
    return getattr(projection, "base_layer", projection).weight


@pytest.mark.parametrize("adapted", [False, True])
def test_what_was_done_is_undone_together(adapted):
    """Blocks out, a patch in, weights masked, an adapter on: inside, the unpruned logits bit for bit, and after an
    exception those of before."""
    model, ids = build("llama").requires_grad_(False), tokens()
    whole = model(ids).logits
    patches, _ = fit_patches(model, CUT, Mean, [Batch(ids, torch.ones_like(ids), ids)] * 8, Runtime(quiet=True))
    made = compress(model, [Removal(CUT), Junction(patches), Mask()])
    if adapted:
        made.model = adapt(made.model)
    before = made.model(ids).logits
    with pytest.raises(KeyError), SharedTeacher(made).unpruned() as unpruned:
        assert torch.equal(unpruned(ids).logits, whole) and weight(made)[:, ::2].abs().max() > 0
        raise KeyError
    assert torch.equal(made.model(ids).logits, before) and not torch.allclose(before, whole, atol=1e-2)
    assert not made.is_stock


def test_it_comes_back_from_disk(tmp_path):
    """Under an adapter: the same logits, and the same unpruned model inside."""
    build("llama").save_pretrained(tmp_path / "base")
    made = load_student(tmp_path / "base", None, done=[Removal(CUT), Mask()], base="key")
    made.model = adapt(made.model)
    save_student(made, tmp_path / "student", base="key")
    again = load_student(tmp_path / "base", tmp_path / "student", done=[Removal(CUT), Mask()], base="key")
    assert torch.equal(again.model(tokens()).logits, made.model(tokens()).logits)
    with SharedTeacher(again).unpruned() as unpruned:
        assert torch.equal(unpruned(tokens()).logits, load_model(tmp_path / "base")(tokens()).logits)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_kind_of_its_own_needs_no_change_of_a_stage(tuning, tmp_path, monkeypatch):
    """Named among the kinds, it is trained with: through AdamW's steps, weight decay and all, the mask holds, while
    of a fully trained layer the other columns move."""
    monkeypatch.setitem(kinds.KINDS, "mask", Mask)
    rows = [Example(str(n), f"Mia has {n} nuts and gets 9 more. How many nuts?", f"#### {n + 9}") for n in range(8)]
    write_rows(rows, tmp_path / "rows.jsonl")
    (cut := Cut.without({2, 3}, 12)).save(tmp_path / "cut.json")
    steps = ("trainer.budget=steps", "trainer.steps=3", "trainer.batch_size=4", "trainer.weight_decay=0.1")
    with composed("loss=sft", f"tuning={tuning}", *steps) as cfg:
        spec = {name: resolve(cfg)[name] for name in ("loss", "tuning", "trainer", "max_length", "seed")}
    shard = Artifact("rows", "rows", tmp_path / "rows.jsonl")
    here = {name: Artifact(name, name, tmp_path) for name in ("cut", "mask")}
    inputs = {"base": BASE, "held_out": shard, "rows": [shard], **here}
    train(tmp_path, **inputs, runtime=Runtime(quiet=True), selfdata={}, **spec, **HOW)
    made = load_student(BASE.path, tmp_path, done=[Removal(cut)], base=BASE.key)
    trained, before = weight(made), blocks(load_model(BASE.path))[0].mlp.down_proj.weight
    if tuning == "full":
        assert trained[:, ::2].abs().max() == 0 < before[:, ::2].abs().max()
    assert torch.equal(trained[:, 1::2], before[:, 1::2]) == (tuning == "lora")


def test_an_input_that_is_no_kind_is_a_mistake_of_the_caller():
    with pytest.raises(TypeError, match="pach is no kind"):
        kinds.read({"cut": None, "pach": BASE})
