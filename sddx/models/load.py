"""Find and load models and tokenizers: safetensors only, no remote code, every weight accounted for."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from sddx.errors import UserError
from sddx.hub import asking
from sddx.models.anatomy import bare, blocks, decoder
from sddx.parallel.distributed import is_joined, shard_apart
from sddx.parallel.launch import release

_log = logging.getLogger(__name__)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# What configs call the longest text, in lm-eval's order, then MPT's name.
CONTEXT = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len")
# What decides what a model computes: weights, settings, tokenizer, chat template.
RUNS = ("*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
FILES = (*RUNS, *TERMS, "README.md")
# The same weights in other forms, which are not read: Mistral's consolidated.safetensors, Llama's original/, onnx/.
ELSEWHERE = ("*/*", "consolidated*", "params.json", "*.bin.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """The `model` group: a folder, a GGUF file or a hub id, its hub revision, the dtype (`auto`: that of its files)
    and attention it computes with; the settings of its config.json that say how large it is, for plans and
    rehearsals without it; the packages of PyPI that hold it, for machines without a hub (sddx.gguf.packaged)."""

    path: str
    revision: str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"]
    attention: str
    dimensions: dict[str, Any] | None = None
    package: dict[str, Any] | None = None


def locate(path: str, *, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder that holds a model, and its hub commit (None for a local folder).

    An existing folder is used in place. Anything else is taken as a hub id: the local hub cache first, then
    the network. Raises UserError for a folder without config.json, a model that cannot be reached, a gated
    model without access, an unknown revision.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is a folder but holds no config.json. Give a model's own folder.")
        return folder.resolve(), None
    snapshot = cached(path, revision) or download(path, revision)
    return snapshot, snapshot.name


def is_here(path: str, revision: str | None) -> bool:
    """Whether `locate` finds a model without the network."""
    return Path(path).expanduser().is_dir() or cached(path, revision) is not None


def require_here(path: str, revision: str | None = None) -> None:
    """Raises UserError where a model is not on this machine."""
    if not is_here(path, revision):
        raise UserError(
            f"model {path!r} is not on this machine, so what of this run is built already cannot be told, and "
            "nothing is downloaded for a look. Without the model, sddx plan with the same settings says "
            "what the run costs; sddx fetch downloads it (with from=pypi the few models that PyPI holds)."
        )


def cached(path: str, revision: str | None) -> Path | None:
    """The snapshot of a hub model in this machine's cache; None where it lacks what a run reads (its licence is not
    asked for)."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = Path(_snapshot(path, revision, RUNS, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return snapshot if _has_weights(snapshot) else None


def download(path: str, revision: str | None) -> Path:
    """Fetch a hub model's snapshot. Raises UserError where it is gated, not found, or out of reach."""
    otherwise = (
        f"model {path!r} was not found. Tried: a local folder, the hub's cache on this machine, the hub. Give an "
        "existing folder or a hub id that can be reached from here, or fetch it where there is a network "
        "(sddx fetch with the same settings; from=pypi brings the few models that PyPI holds); "
        "model=tiny needs none."
    )
    with asking("model", path, revision, otherwise=otherwise):
        return Path(_snapshot(path, revision, FILES))


def _snapshot(path: str, revision: str | None, files: Sequence[str], **options: Any) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        path, revision=revision, allow_patterns=[*files], ignore_patterns=[*ELSEWHERE], **options
    )


def fetched(name: str, files: Sequence[str] = FILES) -> bool:
    """Whether a file of a model's repository, by its name there, is among `files` and in the form that is read."""
    from huggingface_hub.utils import filter_repo_objects

    return any(filter_repo_objects([name], allow_patterns=[*files], ignore_patterns=[*ELSEWHERE]))


def decides(name: str) -> bool:
    """Whether a file of a model's folder, by its name there, can change what the model computes. A key that rests
    on these files alone is that of every copy, with or without licence, README and weights in other forms."""
    return fetched(name, RUNS)


def _has_weights(folder: Path) -> bool:
    """Whether config and every safetensors shard are there: a cached snapshot may be partial. Raises UserError
    where the index of the shards cannot be read."""
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{index} is damaged: {type(error).__name__}: {error}. Fetch the model again."
            ) from error
    return all((folder / name).is_file() for name in ("config.json", *shards))


def load_model(
    folder: Path,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    device: str = "cpu",
    quantization: Any = None,
) -> Any:
    """The causal language model in a folder, in eval mode, weights trainable. With `quantization` (see `four_bit`)
    the linear layers of its blocks are frozen in 4 bit, shard by shard as they are read.

    Raises UserError where weights are not safetensors, are missing, left over or of another shape, where the
    model needs its own code, or where its architecture is not supported.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known. Use one of {', '.join(DTYPES)}.")
    packed: dict[str, Any] = {}
    if quantization is not None:
        packed = {"quantization_config": four_bit(**quantization), "device_map": {"": device}}
    if dtype == "bfloat16" and torch.device(device).type == "cpu" and not has_bfloat16():
        _say_slow()
    model = _read(folder, attention, dtype=DTYPES[dtype], **packed)
    return (model if packed else model.to(device)).eval()


def has_bfloat16() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 itself (with AVX-512 or AMX), and does not imitate it."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def _say_slow() -> None:
    _log.warning(
        "This CPU has no instructions for bfloat16, and products in it are many times as slow as in float32. "
        "model.dtype=float32 gives other numbers, by rounding, in a fraction of the time."
    )


def require_loadable(folder: Path, attention: str) -> None:
    """Raises UserError as `load_model` and `load_tokenizer` would, with all mistakes at once; everything is read
    but the weights' values."""
    _config(folder)  # what is wrong with it stands in the way of all else
    wrong: list[str] = []
    for part in (partial(load_tokenizer, folder), partial(_require_weights, folder, attention)):
        try:
            part()
        except UserError as error:
            wrong.extend(error.args)
    if wrong:
        raise UserError(*wrong)


def _require_weights(folder: Path, attention: str) -> None:
    from transformers.utils import logging as progress

    shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        # In the dtype that they are in, weights stay in their files.
        _read(folder, attention, dtype="auto", device_map="meta")
    finally:
        if shown:
            progress.enable_progress_bar()


def _read(folder: Path, attention: str, **loading: Any) -> Any:
    """The model in a folder, every weight of it accounted for, its blocks in their place."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not _has_weights(folder):
        raise _weightless(folder)
    config = _config(folder)
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if attention not in known and "/" not in attention:
        others = [name for name in known if name.startswith("fl")]
        raise UserError(
            f"model.attention={attention} is not known. Use sdpa or eager (or, with their packages, "
            f"{', '.join(others)})."
        )
    require_capped(config, attention)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            **loading,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, by name
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the libraries below raise a dozen kinds, and each is the user's to mend
        raise UserError(
            f"{folder} does not load with model.attention={attention!r}: {said(error)}. Check the files "
            f"of this {config.model_type} model, or fetch it again; model.attention=eager needs no other package."
        ) from error
    _require_all_weights(report, folder)
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    if any(model.get_parameter(one) is not model.get_parameter(other) for one, other in pairs):
        raise _contradiction(folder)
    decoder(model)  # refuse an architecture without blocks now, not after an hour of scoring
    return model


def _weightless(folder: Path) -> UserError:
    return UserError(
        f"{folder} lacks config.json or model.safetensors (or a shard that its index names). Pickled "
        f"weights are never loaded: convert them to safetensors, or fetch the model again."
    )


def require_capped(config: Any, attention: str) -> None:
    """Raises UserError where a model caps its attention scores (Gemma2) and would run without: transformers' sdpa
    takes the cap and does nothing with it."""
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None and "sdpa" in attention:
        raise UserError(
            f"this {config.model_type} model caps its attention scores at {cap} (attn_logit_softcapping), which "
            f"model.attention={attention} leaves out. Use model.attention=eager."
        )


def said(error: Exception) -> str:
    """What a library says of a mistake: its kind, and the first lines."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:400]}{'...' if len(words) > 400 else ''}".rstrip(".")


def find_device(wanted: str) -> str:
    """The name of a torch device; `auto` is CUDA where there is one, else the CPU. Raises UserError for one that
    torch does not know or this machine does not have."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return "cuda" if count else "cpu"
    device = require_known(wanted)
    if device.type != "cuda":
        _require_working(device)
    elif (device.index or 0) >= count:
        raise UserError(
            f"device={wanted}, but torch finds {count or 'no'} CUDA devices. Use device=auto or device=cpu."
        )
    return wanted


def _require_working(device: torch.device) -> None:
    """Raises UserError for a device that torch knows by name and that holds no numbers here."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend has its own way of not being there
        raise UserError(
            f"device={device} does not work here: {said(error)}. Use device=auto, cpu or cuda."
        ) from None


def require_known(wanted: str) -> Any:
    """The torch device of that name, on whatever machine. Raises UserError where torch knows none, or none that
    computes."""
    try:
        device = torch.device("cpu" if wanted == "auto" else wanted)
    except (RuntimeError, TypeError):
        raise UserError(f"device={wanted} is not known. Use device=auto, cpu or cuda.") from None
    if device.type == "meta":
        raise UserError("device=meta holds no numbers. Use device=auto, cpu or cuda.")
    return device


def four_bit(*, type: str, double: bool, compute: str) -> Any:
    """How linear layers are held in 4 bit (2305.14314): in the values of `type` (nf4, or fp4), one scale for 64
    weights; `double` quantises the scales as well; products are taken in the dtype `compute`. Raises UserError
    for other values, and where bitsandbytes is not installed."""
    from transformers import BitsAndBytesConfig

    if type not in ("nf4", "fp4") or compute not in DTYPES:
        raise UserError(
            f"tuning.quantization of type {type!r} with compute {compute!r} is not known. Use type nf4 or fp4, and "
            f"compute {', '.join(DTYPES)}."
        )
    if find_spec("bitsandbytes") is None:
        raise UserError("4-bit weights need bitsandbytes: pip install 'sddx[qlora]', or use tuning=lora.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=DTYPES[compute],
    )


_frozen: dict[tuple[Path, str, str, str], Any] = {}


def frozen_model(folder: Path, *, dtype: str, attention: str, device: str) -> Any:
    """`load_model` with frozen weights, kept for the next stage that only looks at the same model; in shards in a
    group of processes.

    Nobody may edit it. `free_memory()` lets go of it.
    """
    asked = folder, dtype, attention, device
    if asked not in _frozen:
        _frozen.clear()  # first, since two large models may have no room
        model = load_model(folder, dtype=dtype, attention=attention, device=loading_device(device))
        _frozen[asked] = placed(model.requires_grad_(False), device)
    return _frozen[asked]


def loading_device(device: str) -> str:
    """Where a model is loaded that `placed` puts onto the device: what is to be cut may not fit there."""
    return "cpu" if is_joined() else device


def placed(model: Any, device: str, *others: Any) -> Any:
    """A frozen model on the device; in a group of processes, the weights of its blocks, and of `others` that it
    may run, in one shard a process. `generate` then makes as many passes in all of them."""
    if is_joined():
        shard_apart([*blocks(model), *others], torch.device(device))
        bare(model).generate = partial(bare(model).generate, synced_gpus=True)
    return model.to(device)


def free_memory() -> None:
    """Let go of the frozen model, of models that only hold themselves (a trained one and its hooks), of what torch
    keeps on the GPU, and of processes that hold one in shards, so that the next one finds room."""
    _frozen.clear()
    release()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _require_all_weights(report: dict[str, Any], folder: Path) -> None:
    """Missing weights would be freshly initialised and left-over ones dropped, with a warning at most."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, report[problem]))
        if keys:
            shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            raise UserError(
                f"the weights in {folder} do not fit its config.json: {len(keys)} "
                f"{problem.replace('_', ' ')} ({shown}). Check num_hidden_layers, or fetch the model again."
            )


def _contradiction(folder: Path) -> UserError:
    return UserError(
        f"config.json in {folder} says tie_word_embeddings, that head and embeddings are one, and the file holds a "
        "head of its own with other values. Readers take one or the other. Set tie_word_embeddings to false for "
        "the file's head, or remove that head from the file."
    )


def require_one_head(folder: Path, skeleton: Any) -> None:
    """Raises UserError where a model's config says that weights are one and its file holds two that differ: which
    one counts would hang on who reads it. `skeleton` is the model on the meta device. The weights are read only
    where both are in the file."""
    for one, other in skeleton.get_expanded_tied_weights_keys(all_submodels=True).items():
        if (first := _in_file(folder, one)) is None or (second := _in_file(folder, other)) is None:
            continue
        if not torch.equal(first, second):
            raise _contradiction(folder)


def _in_file(folder: Path, name: str) -> torch.Tensor | None:
    """A weight of a model's safetensors, or None."""
    index = folder / "model.safetensors.index.json"
    shard = (
        json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name)
        if index.is_file()
        else "model.safetensors"
    )
    if shard is None:
        return None
    with safe_open(folder / shard, framework="pt") as weights:
        return weights.get_tensor(name) if name in weights.keys() else None  # noqa: SIM118


def require_embedded(tokenizer: Any, config: Any, texts: Iterable[str] = ()) -> None:
    """Raises UserError where a token that the tokenizer puts in by itself, or that the chat template or one of the
    `texts` names, has no row in the model's embeddings."""
    size, added = config.get_text_config().vocab_size, tokenizer.get_added_vocab()
    beyond = {token: number for token, number in added.items() if number >= size}
    if not beyond:
        return
    named = [getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")]
    read = [str(tokenizer.chat_template or ""), *texts]
    used = [token for token in beyond if token in named or any(token in text for text in read)]
    if used:
        raise UserError(
            f"The model has {size} embeddings, and its tokenizer has tokens beyond them that are read: "
            f"{', '.join(f'{token} ({beyond[token]})' for token in used)}. Resize the model's embeddings and train "
            "it on them, or remove these tokens from the tokenizer."
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder. The end token pads where no pad token is set; the side is the caller's."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a broken tokenizer.json raises a bare one
        raise UserError(
            f"no tokenizer loads from {folder}: {said(error)}. Copy the tokenizer's files from where the model "
            "came from, or fetch the model again."
        ) from error
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer in {folder} has no end token (eos_token). Set one in its config.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def text_config(folder: Path) -> Any:
    """The config of a model's decoder, read without its weights. Raises UserError where it cannot be."""
    return _config(folder).get_text_config()


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each field has a kind of its own to be wrong in
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder} brings code of its own, which is never run. Use a model that transformers itself knows."
            ) from error
        raise UserError(
            f"config.json in {folder} cannot be read: {said(error)}. Mend it, or fetch the model again."
        ) from error


def stated_dtype(path: str, revision: str | None) -> str:
    """The dtype that the config of a model on the hub says its weights are in. Raises UserError as `download` does,
    and where it says none."""
    from huggingface_hub import hf_hub_download

    otherwise = (
        f"model.dtype=auto is the dtype that a model's own files say, and {path!r} is neither on this machine nor "
        "can the hub be asked for it. Give an existing folder, a GGUF file or a hub id; model=tiny needs none."
    )
    with asking("model", path, revision, otherwise=otherwise):
        file = hf_hub_download(path, "config.json", revision=revision)
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in DTYPES:
        raise UserError(f"The config of {path} says no dtype that is known ({dtype}). Give model.dtype=bfloat16.")
    return dtype


def own_dtype(folder: Path) -> str:
    """The dtype that a model's files hold it in: what its config says, or that of its first weight of real numbers.
    Raises UserError for one that no model can be asked to compute in, and where there are no weights."""
    if (said_by_config := getattr(_config(folder), "dtype", None)) is not None:
        dtype = str(said_by_config).removeprefix("torch.")
    elif not (shards := sorted(folder.glob("*.safetensors"))):
        raise _weightless(folder)
    else:
        with safe_open(shards[0], framework="pt") as weights:
            kinds = (weights.get_tensor(name).dtype for name in weights.keys())  # noqa: SIM118
            dtype = next((str(kind).removeprefix("torch.") for kind in kinds if kind.is_floating_point), "none")
    if dtype not in DTYPES:
        raise UserError(f"{folder} holds its weights as {dtype}. Give model.dtype={', '.join(DTYPES)}.")
    return dtype


def context_of(config: Any) -> int | None:
    """The tokens that a model was made for at most; None where its config does not say."""
    text = config.get_text_config()
    lengths = (getattr(text, name, None) for name in CONTEXT)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)
