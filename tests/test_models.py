"""Laws of models: parts are found, weights are all accounted for, students belong to their cut and base."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
from families import FAMILIES, VOCABULARY, adapt, build, tokens
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AlbertConfig,
    AlbertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sddx.compression.remove import Removal, apply_cut
from sddx.data.encode import require_template
from sddx.errors import UserError
from sddx.models import load
from sddx.models.anatomy import blocks, decoder, final_norm, head
from sddx.models.load import (
    find_device,
    load_model,
    load_tokenizer,
    locate,
    require_loadable,
)
from sddx.models.narrow import built, narrow
from sddx.models.outputs import head_of, require_own_head, run
from sddx.records import Cut
from sddx.students.student import load_student, save_student
from sddx.students.trial import small_model

pytestmark = pytest.mark.fast

CUT = Cut.without({1, 2}, 5)
DONE = [Removal(CUT)]


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_found_with_and_without_an_adapter(family):
    """The same objects through peft's wrapper."""
    model = build(family)
    parts = (decoder, blocks, final_norm, head)
    bare = [part(model) for part in parts]
    adapted = adapt(model, targets=["q_proj"])
    assert all(part(adapted) is found for part, found in zip(parts, bare, strict=True))
    assert len(blocks(adapted)) == 5


def test_a_model_without_a_list_of_blocks_is_refused_in_a_sentence():
    """ALBERT runs one block over and over, and no list holds it as often."""
    shape = dict(vocab_size=8, hidden_size=8, num_attention_heads=1, intermediate_size=8, embedding_size=8)
    with pytest.raises(UserError, match="blocks cannot be found in a AlbertForMaskedLM: a decoder-only"):
        blocks(AlbertForMaskedLM(AlbertConfig(**shape)))


def test_shared_keys_and_values_are_refused_with_the_reason():
    """A tail that shares keys and values reads the cache by index from the end, which a cut moves."""
    model = build("llama")
    model.config.num_kv_shared_layers = 2
    with pytest.raises(UserError, match="reuse keys and values"):
        apply_cut(model, CUT)


@pytest.mark.parametrize("family", FAMILIES)
def test_run_gives_the_models_own_logits_and_states(family):
    """Exactly, softcapping included; the last state is after the norm, as transformers' own."""
    model, ids = build(family), tokens()
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    outputs = run(model, ids, mask, states=True)
    own = model(ids, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(outputs.head(outputs.hidden), own.logits)
    assert len(outputs.states) == 5
    assert all(torch.equal(a, b) for a, b in zip(outputs.states, own.hidden_states[1:], strict=True))
    assert run(model, ids, mask).states == ()


def of_type(kind: str, **settings) -> torch.nn.Module:
    """A narrow random model of any of transformers' families, float64."""
    config = narrow(CONFIG_MAPPING[kind]().get_text_config(), width=32, vocabulary=VOCABULARY, num_hidden_layers=3)
    for name, value in settings.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return built(config, torch.float64, attn_implementation="eager").eval()


# What stands between the projection and the logits of each; None where nothing does.
HEADS = {
    "llama": {}, "opt": {}, "mpt": {}, "gpt_neox": {}, "glm4": {}, "phi3": {},
    "granite": {"logits_scaling": 8.0}, "cohere": {"logit_scale": 0.06}, "cohere2": {"logit_scale": 0.06},
    "minicpm3": {"dim_model_base": 8}, "gemma2": {"final_logit_softcapping": 0.1}, "nanochat": {},
}  # fmt: skip
SCALED = ("granite", "cohere", "cohere2", "minicpm3", "gemma2", "nanochat")


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_is_all_that_the_model_does_after_its_body(kind):
    """Scaled, divided, capped: the logits and their gradients are the model's own, also for chosen rows alone."""
    model, ids = of_type(kind, **HEADS[kind]), tokens()
    outputs = run(model, ids, torch.ones_like(ids))
    own = model(ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(outputs.head(outputs.hidden), own)
    torch.testing.assert_close(outputs.head(outputs.hidden[1, 3:5]), own[1, 3:5])
    assert torch.allclose(head(model)(outputs.hidden), own) != (kind in SCALED)
    gradients = []
    for logits in (own, outputs.head(outputs.hidden)):
        model.zero_grad()
        logits.log_softmax(-1)[..., 3].sum().backward()
        gradients.append({name: w.grad for name, w in model.named_parameters() if w.grad is not None})
    torch.testing.assert_close(*gradients)
    require_own_head(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_head_is_its_projection_bit_for_bit(dtype):
    """Values and gradients, of rows and of batches."""
    model = build("llama").to(dtype)
    for shape in ((7, 32), (2, 7, 32)):
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        made = []
        for projection in (model.lm_head, head_of(model)):
            rows = hidden.clone().requires_grad_()
            logits = projection(rows)
            logits.float().log_softmax(-1)[..., 5].sum().backward()
            made.append((logits, rows.grad, model.lm_head.weight.grad.clone()))
            model.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_an_adapter_on_a_scaled_head_is_part_of_it():
    model = adapt(of_type("granite", logits_scaling=8.0), targets=["q_proj", "lm_head"])
    outputs = run(model, tokens(), torch.ones(3, 12))
    assert torch.equal(outputs.head(outputs.hidden), model(tokens(), attention_mask=torch.ones(3, 12)).logits)


def test_the_head_makes_no_pass_through_the_body():
    """Memory of a chunk stays that of its logits: not a block runs, whatever watches the model."""
    model, ran = build("llama"), []
    for module in (model, decoder(model), *blocks(model)):
        module.register_forward_hook(lambda *_: ran.append(1))
    head_of(model)(torch.zeros(4, 32))
    assert not ran


def test_a_head_that_is_not_the_models_is_told_before_any_cut(monkeypatch):
    """Here a model that adds to its hidden states between body and head what only a whole pass knows."""
    model = build("llama")
    forward = type(model).forward

    def shifted(self, input_ids=None, **named):
        made = forward(self, input_ids=input_ids, **named)
        made.logits = made.logits if input_ids is None else made.logits + 1
        return made

    monkeypatch.setattr(type(model), "forward", shifted)
    with pytest.raises(UserError, match="head of a LlamaForCausalLM .* by up to 1.*not about the cut"):
        require_own_head(model)


def test_gradients_flow_through_states():
    """Also where the blocks recompute their activations (gradient checkpointing): the same gradients."""
    gradients = []
    for recompute in (False, True):
        model = build("llama").train()
        if recompute:
            model.gradient_checkpointing_enable()
        outputs = run(model, tokens(), torch.ones(3, 12), states=True)
        sum(state.square().mean() for state in outputs.states).backward()
        gradients.append(blocks(model)[0].mlp.down_proj.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def saved(folder, family="llama"):
    model = build(family)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_load_gives_back_what_was_saved(family, tmp_path):
    """Eval mode, the dtype asked for, the same logits."""
    model = saved(tmp_path, family)
    again = load_model(tmp_path)
    assert not again.training and again.config.use_cache == model.config.use_cache
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert load_model(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(tmp_path, attention="eager").config._attn_implementation == "eager"


def own_memory() -> int:
    """Bytes of this process that no file backs and no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells")
def test_weights_in_their_files_dtype_take_no_memory_of_their_own(tmp_path):
    """They are mapped from the files: processes that load the same model for its shards hold it once together."""
    wide = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=64)
    LlamaForCausalLM(wide).bfloat16().save_pretrained(tmp_path)
    before = own_memory()
    model = load_model(tmp_path, dtype="bfloat16").requires_grad_(False)
    weights = sum(weight.numel() * 2 for weight in model.parameters())
    assert weights > 60e6 and own_memory() - before < weights / 4


def test_one_frozen_model_is_held_at_a_time(tmp_path, monkeypatch):
    """Asked for again in any order of names it is the same; another is loaded when the first is gone."""
    saved(tmp_path)
    how = {"dtype": "float32", "attention": "sdpa", "device": "cpu"}
    held, loading = load.frozen_model(tmp_path, **how), load.load_model
    assert load.frozen_model(tmp_path, **dict(reversed(how.items()))) is held
    gone = weakref.ref(held)
    del held

    def load_alone(*given, **named):
        assert gone() is None
        return loading(*given, **named)

    monkeypatch.setattr(load, "load_model", load_alone)
    load.frozen_model(tmp_path, **how | {"dtype": "float64"})
    load.free_memory()


def change_depth(folder, depth):
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = depth
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.0.input_layernorm.weight"
DAMAGES = {
    "missing": lambda folder: change_depth(folder, 7),
    "unexpected": lambda folder: change_depth(folder, 3),
    r"missing keys \(model.norm.weight\)": lambda folder: change_weights(
        folder, lambda w: w.pop("model.norm.weight")
    ),
    rf"mismatched keys \(\('{NORM}'.*7": lambda folder: change_weights(
        folder, lambda w: w.update({NORM: torch.ones(7)})
    ),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_missing_left_over_and_misshapen_weights_are_errors(said, tmp_path):
    """Transformers would start fresh blocks and say so in a log line."""
    saved(tmp_path)
    DAMAGES[said](tmp_path)
    with pytest.raises(UserError, match=said):
        load_model(tmp_path)


def written(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


INDEX = "model.safetensors.index.json"
BROKEN = {
    r"config.json.*cannot be read.*JSON": lambda f: written(f, "config.json", '{"a":'),
    r"config.json.*cannot be read.*'abc'": lambda f: change_depth(f, "abc"),
    "SafetensorError": lambda f: os.truncate(f / "model.safetensors", 20_000),
    "SafetensorError.*header": lambda f: written(f, "model.safetensors", b""),
    "is damaged: JSONDecodeError": lambda f: written(f, INDEX, "{"),
    "is damaged: TypeError": lambda f: written(f, INDEX, "[]"),
    "a shard that its index names": lambda f: written(f, INDEX, '{"weight_map": {"a": "gone.safetensors"}}'),
    "no tokenizer loads": lambda f: written(f, "tokenizer.json", '{"a": 1}'),
    "no tokenizer loads from": lambda f: (f / "tokenizer.json").unlink(),
    "2 missing keys": lambda f: change_weights(f, lambda w: (w.pop(NORM), w.pop("model.norm.weight"))),
    r"model.attention=nope is not known": lambda f: None,
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_damaged_folder_is_told_without_loading_weights(said, tmp_path):
    saved(tmp_path)
    tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    require_loadable(tmp_path, "sdpa")
    BROKEN[said](tmp_path)
    with pytest.raises(UserError, match=said) as told:
        require_loadable(tmp_path, "nope" if "attention" in said else "sdpa")
    assert len(told.value.args) == 1


def test_all_that_is_wrong_with_a_folder_is_told_at_once(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError) as told:
        require_loadable(tmp_path, "nope")
    assert [("tokenizer" in each, "nope" in each) for each in told.value.args] == [(True, False), (False, True)]


@pytest.mark.parametrize("name", ["foo", "meta", "hpu", "mps", "xpu", "privateuseone", "vulkan", "cuda:7"])
def test_a_device_that_is_not_here_is_told(name):
    with pytest.raises(UserError, match=f"device={name}.*Use device=auto"):
        find_device(name)
    assert find_device("cpu") == "cpu"


def test_pickled_weights_are_never_loaded(tmp_path):
    model = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (load_model, load.own_dtype):
        with pytest.raises(UserError, match="convert them to safetensors"):
            read(tmp_path)


def test_remote_code_is_never_run(tmp_path):
    """A folder that brings its own architecture is refused, and its file not imported."""
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(UserError, match="code of its own, which is never run"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("wrong", [{"dtype": "bf16"}, {"attention": "no_such"}])
def test_unknown_dtype_and_attention_are_named(wrong, tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match=next(iter(wrong.values()))):
        load_model(tmp_path, **wrong)


@pytest.mark.parametrize("cap", [2.0, None])
def test_capped_attention_is_not_run_by_what_leaves_the_cap_out(cap, tmp_path):
    """The cap is felt, so that sdpa would give other logits; without one both are the same."""
    model = build("gemma2")
    model.config.attn_logit_softcapping = cap
    model.save_pretrained(tmp_path)
    expected = load_model(tmp_path, attention="eager")(tokens()).logits
    if cap is None:
        torch.testing.assert_close(load_model(tmp_path, attention="sdpa")(tokens()).logits, expected)
        return
    for ask in (partial(load_model, tmp_path, attention="sdpa"), partial(require_loadable, tmp_path, "sdpa")):
        with pytest.raises(UserError, match="attn_logit_softcapping.*Use model.attention=eager"):
            ask()
    with pytest.raises(UserError, match="attn_logit_softcapping"):
        small_model(model.config, "sdpa")
    model.set_attn_implementation("sdpa")
    assert (model(tokens()).logits - expected).abs().max() > 1e-2


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "kind, head, rotation",
    [
        ("phi3", {"hidden_size": 512, "num_attention_heads": 4}, LONG | {"partial_rotary_factor": 0.75}),
        ("llama", {"head_dim": 128}, LONG),
        (
            "gemma3_text", {"head_dim": 128},
            {"full_attention": LONG, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        ),
    ],
)  # fmt: skip
def test_a_narrow_model_turns_as_many_channels_as_its_heads_have(kind, head, rotation):
    """Where a part of them is turned (Phi-4-mini), and where each kind of layer has factors of its own."""
    pairs = int(128 * rotation.get("partial_rotary_factor", 1)) // 2
    factors = {name: [1.0 + number for number in range(pairs)] for name in ("short_factor", "long_factor")}
    if "full_attention" in rotation:
        rotation = rotation | {"full_attention": LONG | factors}
    else:
        rotation = rotation | factors
    config = CONFIG_MAPPING[kind](**head, num_hidden_layers=6, rope_parameters=rotation, pad_token_id=0)
    model = built(narrow(config, width=32, vocabulary=VOCABULARY), torch.float32)
    assert model(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, VOCABULARY)


def test_locate_takes_a_folder_in_place(tmp_path):
    saved(tmp_path)
    assert locate(str(tmp_path)) == (tmp_path.resolve(), None)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        locate(str(tmp_path))


def test_locate_takes_the_cache_before_the_network(tmp_path, monkeypatch):
    """A complete snapshot costs no call; a partial one is fetched again."""
    snapshot, calls = tmp_path / "abc123", []
    saved(snapshot)

    def download(repo, *, local_files_only=False, **_):
        calls.append(local_files_only)
        if not local_files_only:
            saved(snapshot)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("some/model") == (snapshot, "abc123") and calls == [True]
    (snapshot / "model.safetensors").unlink()
    assert locate("some/model") == (snapshot, "abc123") and calls == [True, True, False]


RESPONSE = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co"))
FAILURES = [
    (GatedRepoError("no", response=RESPONSE), "hf auth login"),
    (RepositoryNotFoundError("no", response=RESPONSE), "model=tiny needs none"),
    (LocalEntryNotFoundError("no"), "Tried: a local folder"),
    (httpx.ConnectError("no"), "model=tiny needs none"),
]


@pytest.mark.parametrize("failure, said", FAILURES)
def test_locate_says_what_was_tried(failure, said, monkeypatch):
    """Gated is told apart from not found."""

    def download(repo, *, local_files_only=False, **_):
        raise LocalEntryNotFoundError("not cached") if local_files_only else failure

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=said):
        locate("some/model")


def test_a_path_that_is_no_hub_id_is_refused_without_a_call():
    with pytest.raises(UserError, match="/no/such/folder/here"):
        locate("/no/such/folder/here")


def tokenizer(**special):
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


def test_the_end_token_pads_where_no_pad_token_is(tmp_path):
    tokenizer(eos_token="</s>").save_pretrained(tmp_path / "plain")
    tokenizer(eos_token="</s>", pad_token="<unk>").save_pretrained(tmp_path / "padded")
    assert load_tokenizer(tmp_path / "plain").pad_token_id == 1
    assert load_tokenizer(tmp_path / "padded").pad_token_id == 0


def test_a_tokenizer_without_end_token_or_chat_template_is_refused(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end token"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        require_template(tokenizer())
    chatty = tokenizer()
    chatty.chat_template = "{{ messages }}"
    require_template(chatty)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.fixture
def base(tmp_path):
    """A folder with the unpruned model."""
    saved(tmp_path / "base", "qwen3")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    """A saved student with a random adapter, and the logits that it gave."""
    student = load_student(base, None, done=DONE, base="key")
    student.model = adapt(student.model)
    save_student(student, tmp_path / "student", base="key")
    return tmp_path / "student", student.model(tokens()).logits


def test_an_adapter_comes_back_on_its_own_blocks(base, adapter):
    """Base, cut, adapter: the same logits bit for bit; and the adapter matters."""
    folder, logits = adapter
    again = load_student(base, folder, done=DONE, base="key").model
    assert torch.equal(again(tokens()).logits, logits) and not again.training
    pruned = load_student(base, None, done=DONE, base="key").model
    assert not torch.allclose(pruned(tokens()).logits, logits, atol=0.1)


def test_full_weights_come_back_without_the_base(base, tmp_path):
    student = load_student(base, None, done=DONE, base="key")
    save_student(student, tmp_path / "student", base="key")
    shutil.rmtree(base)
    again = load_student(base, tmp_path / "student", done=DONE, base="key").model
    assert torch.equal(again(tokens()).logits, student.model(tokens()).logits)


@pytest.mark.parametrize("full", [False, True])
def test_another_cut_or_base_is_refused(full, base, adapter, tmp_path):
    """The names of the weights would fit, the blocks would not."""
    folder, _ = adapter
    if full:
        folder = tmp_path / "full"
        save_student(load_student(base, None, done=DONE, base="key"), folder, base="key")
    with pytest.raises(UserError, match=r"blocks \[1, 2\] of 5 removed, and blocks \[2, 3\]"):
        load_student(base, folder, done=[Removal(Cut.without({2, 3}, 5))], base="key")
    with pytest.raises(UserError, match="belongs to base model key, and other"):
        load_student(base, folder, done=DONE, base="other")
    (folder / "cut.json").unlink()
    with pytest.raises(UserError, match="does not say which cut"):
        load_student(base, folder, done=DONE, base="key")


def test_an_adapter_that_lost_a_weight_is_refused(base, adapter):
    """peft itself warns and goes on."""
    folder, _ = adapter
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="1 weights are missing or left over"):
        load_student(base, folder, done=DONE, base="key")


def test_a_cpu_without_bfloat16_is_told_so_once(tmp_path, monkeypatch, caplog):
    """It imitates it, many times as slow as float32, and nobody would know why. Not of another dtype."""
    build("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(load, "has_bfloat16", lambda: False)
    load._say_slow.cache_clear()
    load_model(tmp_path, dtype="float32")
    assert "no instructions for bfloat16" not in caplog.text
    for _ in range(2):
        load_model(tmp_path, dtype="bfloat16")
    assert caplog.text.count("no instructions for bfloat16") == 1
