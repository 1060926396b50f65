"""A word-level tokenizer with a chat template, and a tiny random model to go with it."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<start>", "<user>", "<assistant>", "<end>", "<unknown>"]
WORDS = [*map(str, range(10)), *"how many apples are there what is plus minus the answer a b c d . ?".split()]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} <{{ m.role }}> {{ m.content }}"
    "{% if m.role == 'assistant' %} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=TEMPLATE,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
        additional_special_tokens=["<user>", "<assistant>"],
    )


def tiny_llama(**changes: int) -> LlamaForCausalLM:
    """Four blocks of width 16, in float64 so that batches agree far beyond any near tie."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS),
        max_position_embeddings=64,
        initializer_range=0.6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=4,
        **(sizes | changes),
    )
    return LlamaForCausalLM(config).double().eval()
