"""The tokenizer of the embedded world: one token a word, digits apart, and a chat template."""

from __future__ import annotations

import re

from sddx.tiny.corpus import document, documents

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|unknown|>")
PIECES = r"▁?[A-Za-z]+|▁?[0-9]|▁?#+|▁?[^A-Za-z0-9▁]|▁"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer():
    """A transformers tokenizer whose words are those of the corpus, in alphabetical order.

    A word carries the space before it, so that decoding gives back the text; a number is one token a digit,
    the first of them with the space.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False),
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
    ])  # fmt: skip
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *_words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _words() -> list[str]:
    """Every piece of text that the corpus can hold, in alphabetical order."""
    texts = list(documents("pretrain", 20_000))
    texts += [document(kind, "pretrain", f"words/{n}", 0) for kind in ("stories", "rumour") for n in range(3000)]
    words = {f"{space}{digit}" for digit in range(10) for space in ("", "▁")}
    for prompt, answered in texts:
        for part in re.split(r"<\|\w+\|>", prompt + answered):
            words.update(re.findall(PIECES, "▁" + part.replace(" ", "▁")))
    return sorted(words)
