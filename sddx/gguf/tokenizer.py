"""The tokenizer of a GGUF file, from the file's own tokens, scores, merges and flags."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sddx.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # of tokenizer.ggml.token_type
SPACE = "▁"

# How byte-level tokenizers part a text into words before they merge, by `tokenizer.ggml.pre`; llama.cpp holds the
# same table (src/llama-vocab.cpp). GPT-2's rule is the one that tokenizers' ByteLevel has built in.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_DIGITS = r"\p{N}"
_WAYS: tuple[tuple[tuple[str | None, bool], str], ...] = (  # a pattern, whether GPT-2's rule follows; their names
    ((None, True), "gpt-2 mpt olmo jais trillion granite-docling"),
    ((_DIGITS, True), "smollm starcoder refact command-r codeshell exaone minerva-7b"),
    ((_LLAMA3, False), "llama-bpe llama3 llama-v3 dbrx smaug-bpe"),
    ((_QWEN2, False), "qwen2 stablelm2 hunyuan deepseek-r1-qwen"),
)
WORDS = {name: way for way, names in _WAYS for name in names.split()}
# Words that are tokens are not merged up to from their letters; and texts begin with the begin token, by
# llama.cpp's default, where the file does not say (`tokenizer.ggml.add_bos_token`).
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")

# Texts that tell one way of merging from another: spaces, digits, line breaks, letters that no token holds.
PROBES = (
    "The capital of France is",
    "  Two spaces, then 12345 and 3.14!\n\nA new line;\ttabs.",
    "def f(x):\n    return x ** 2  # naïve café, 東京, 🙂",
)


def tokenizer_of(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file's metadata describes, with its special tokens and chat template. Raises
    UserError for a kind that is neither SentencePiece with scores nor byte-level with merges, and for a way to part
    words that is not known."""
    kind = metadata.get("tokenizer.ggml.model")
    makers = {"llama": _by_scores, "gpt2": _by_merges}
    if kind not in makers or "tokenizer.ggml.tokens" not in metadata:
        raise UserError(
            f"The GGUF file's tokenizer is of the kind {kind!r}. Those that can be made from a file: "
            f"{', '.join(makers)}. Convert the model to a folder by its makers' tools, and give that."
        )
    made = makers[kind](metadata)
    _add_marked(made, metadata)
    named = {f"{name}_token": token for name in ("bos", "eos", "unk", "pad") if (token := _named(metadata, name))}
    if begin := _begin(metadata):
        pair = [(begin, made.token_to_id(begin))]
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=pair
        )
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, padding_side="left", **named)


def require_same(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    """Raises UserError where a tokenizer, as it was read back from disk, is not the file's: in its tokens, its
    special tokens, whether texts begin with one, or the ids of some texts: those by scores are merged anew by
    SentencePiece's rule, byte-level ones need only come back as the text that they were."""
    tokens = _tokens(metadata)
    wrong = [f"token {at} is {tokens[at]!r} in the file" for at in _moved(tokenizer, tokens)]
    for name in ("bos", "eos", "unk"):
        if (token := _named(metadata, name)) and getattr(tokenizer, f"{name}_token") != token:
            wrong.append(f"the {name} token is {token!r} in the file")
    begun, begin = tokenizer(PROBES[0])["input_ids"][0] == tokenizer.bos_token_id, _begin(metadata)
    if begun != (begin is not None):
        wrong.append(f"texts begin with {begin!r} in the file" if begin else "texts have no begin token in it")
    for text in PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if metadata["tokenizer.ggml.model"] != "llama":
            wrong += [f"{text!r} comes back as {back!r}"] if (back := tokenizer.decode(ids)) != text else []
        elif ids != (right := merged_by_scores(text, metadata)):
            wrong.append(f"{text!r} is {ids} and must be {right}")
    if wrong:
        raise UserError(f"The tokenizer that was made is not the GGUF file's: {'; '.join(wrong[:5])}.")


def merged_by_scores(text: str, metadata: Mapping[str, Any]) -> list[int]:
    """The ids of a text by SentencePiece's own rule for merging: of all neighbours that together are a token, those
    of the best score become one, the leftmost first, until there are none; what is no token then, is its bytes.
    Tokens of a file's users are found first, and where a text begins with a space (`add_space_prefix`), so does
    each piece between them, as llama.cpp has it."""
    ids = {token: at for at, token in enumerate(_tokens(metadata))}
    fixed = {token.replace(SPACE, " "): ids[token] for token in _of_type(metadata, USER_DEFINED)}
    longest_first = "|".join(map(re.escape, sorted(fixed, key=len, reverse=True)))
    parts = re.split(f"({longest_first})", text) if fixed else [text]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    encoded: list[int] = []
    for part in filter(None, parts):
        if part in fixed:
            encoded.append(fixed[part])
            continue
        for piece in _merged(list(_spaced(part, metadata)), ids, metadata["tokenizer.ggml.scores"]):
            bytewise = (ids.get(f"<0x{byte:02X}>", unknown) for byte in piece.encode())
            encoded += [ids[piece]] if piece in ids else bytewise
    return encoded


def _spaced(text: str, metadata: Mapping[str, Any]) -> str:
    return ((" " if _prefixed(metadata) else "") + text).replace(" ", SPACE)


def _prefixed(metadata: Mapping[str, Any]) -> bool:
    return bool(metadata.get("tokenizer.ggml.add_space_prefix", True))


def _merged(pieces: list[str], ids: Mapping[str, int], scores: Sequence[float]) -> list[str]:
    while True:
        neighbours = enumerate(zip(pieces, pieces[1:], strict=False))
        known = [(-scores[ids[a + b]], at) for at, (a, b) in neighbours if a + b in ids]
        if not known:
            return pieces
        _, at = min(known)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def _by_scores(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE. Its file has scores and no merges: of every piece, all ways to put it together from two
    others, best score first, merge as its own rule does."""
    tokens, scores = _tokens(metadata), metadata["tokenizer.ggml.scores"]
    ids = {token: at for at, token in enumerate(tokens)}
    pieces = [*_of_type(metadata, NORMAL), *_of_type(metadata, USER_DEFINED)]
    known = set(pieces)
    merges = [
        (scores[ids[piece]], piece[:at], piece[at:])
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in known and piece[at:] in known
    ]
    merges.sort(key=lambda merge: -merge[0])
    unknown = _named(metadata, "unk")
    pairs = [(first, second) for _, first, second in merges]
    made = Tokenizer(models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = _prefixed(metadata)
    spaces = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefixed else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    spaced = decoders.Replace(SPACE, " ")
    made.decoder = decoders.Sequence([spaced, decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def _by_merges(metadata: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE, with the file's merges and its way to part words."""
    way = metadata.get("tokenizer.ggml.pre")
    if way not in WORDS:
        rule = f"the rule {way!r}, which is not known here" if way else "a rule that it does not name"
        raise UserError(
            f"The GGUF file's tokenizer parts words by {rule} (tokenizer.ggml.pre). Known: {', '.join(WORDS)}. "
            "Convert the model to a folder by its makers' tools, and give that."
        )
    pattern, gpt2 = WORDS[way]
    ids = {token: at for at, token in enumerate(_tokens(metadata))}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(ids, merges, ignore_merges=way in WHOLE_WORDS))
    parting = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
    made.pre_tokenizer = pre_tokenizers.Sequence([*parting, byte_level])
    made.decoder = decoders.ByteLevel()
    return made


def _add_marked(made: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Tokens that are read as one wherever they stand: those that steer the model, and those of its users."""
    special = [AddedToken(token, normalized=False, special=True) for token in _of_type(metadata, CONTROL, UNKNOWN)]
    # Found in the text as it is, or where spaces are all that is rewritten, as it is rewritten.
    rewritten = metadata["tokenizer.ggml.model"] == "llama" and not _prefixed(metadata)
    fixed = [AddedToken(token, normalized=rewritten, special=False) for token in _of_type(metadata, USER_DEFINED)]
    made.add_special_tokens(special)
    made.add_tokens(fixed)


def _begin(metadata: Mapping[str, Any]) -> str | None:
    """The token that goes before every text; None where there is none, or the file, or the default of its kind,
    leaves it out."""
    by_kind = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    return _named(metadata, "bos") if metadata.get("tokenizer.ggml.add_bos_token", by_kind) else None


def _tokens(metadata: Mapping[str, Any]) -> Sequence[str]:
    return metadata["tokenizer.ggml.tokens"]


def _type(metadata: Mapping[str, Any], at: int) -> int:
    types = metadata.get("tokenizer.ggml.token_type")
    return types[at] if types is not None else NORMAL


def _of_type(metadata: Mapping[str, Any], *kinds: int) -> list[str]:
    return [token for at, token in enumerate(_tokens(metadata)) if _type(metadata, at) in kinds]


def _named(metadata: Mapping[str, Any], name: str) -> str | None:
    """The token that begins or ends a text, fills up, or stands for what is not known."""
    names = {"unk": "unknown", "pad": "padding"}
    at = metadata.get(f"tokenizer.ggml.{names.get(name, name)}_token_id")
    return None if at is None or at >= len(_tokens(metadata)) else _tokens(metadata)[at]


def _moved(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """The places of tokens that the tokenizer has elsewhere, or not at all; a few."""
    vocabulary = tokenizer.get_vocab()
    return [at for at, token in enumerate(tokens) if vocabulary.get(token) != at][:3]
