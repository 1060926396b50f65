"""The tables of families: what structure cannot tell (`models.structure` finds the rest), and which settings of a
config hang on the numbers of blocks.


No key hangs on the tables, so that a new family moves none: what they say of one model (`reading`) counts with it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BRANCHED = "Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Gemma2 and Gemma3, Phi-3, GPT-NeoX, OPT and MPT"


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block, by the names of its modules there.

    `core` is the module that attends or that ends the feed-forward branch; `others` are those that serve
    nothing else; `post` is a norm between the core's output and the residual stream.
    """

    core: str
    others: tuple[str, ...]
    post: str | None = None


@dataclass(frozen=True)
class Family:
    """What the two residual branches of a family's blocks are made of.

    `last_linear` is the path in a block of the linear layer that writes the feed-forward branch's output;
    `has_bias` says that it has a bias, `bias_setting` names a setting of the config that gives it (and its
    neighbours in the branch) one.
    """

    attention: Branch = Branch("self_attn", ("input_layernorm",))
    feedforward: Branch = Branch("mlp", ("post_attention_layernorm",))
    last_linear: str = "mlp.down_proj"
    has_bias: bool = False
    bias_setting: str | None = None

    @property
    def written(self) -> str:
        """The path of the module whose output the feed-forward branch adds to the residual stream."""
        return self.feedforward.post or self.last_linear


_GEMMA = Family(
    attention=Branch("self_attn", ("input_layernorm",), "post_attention_layernorm"),
    feedforward=Branch("mlp", ("pre_feedforward_layernorm",), "post_feedforward_layernorm"),
)
FAMILIES = {
    "llama": Family(bias_setting="mlp_bias"),
    **dict.fromkeys(("mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3"), Family()),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt_neox": Family(
        attention=Branch("attention", ("input_layernorm",)),
        feedforward=Branch("mlp", ("post_attention_layernorm",)),
        last_linear="mlp.dense_4h_to_h",
        has_bias=True,
    ),
    "opt": Family(
        attention=Branch("self_attn", ("self_attn_layer_norm",)),
        feedforward=Branch("fc2", ("final_layer_norm", "fc1", "activation_fn")),
        last_linear="fc2",
        has_bias=True,
    ),
    "mpt": Family(
        attention=Branch("attn", ("norm_1",)),
        feedforward=Branch("ffn", ("norm_2",)),
        last_linear="ffn.down_proj",
    ),
}


# Settings of configs that name blocks by their numbers ..
NUMBERS = (
    "moe_layers", "mlp_only_layers", "full_attn_idxs", "ple_layer_ids", "hybrid_layer_ids",
    "cross_attention_layers",
)  # fmt: skip
# .. and by a number below which they are of a kind (of the last one of a kind, that number and 1).
BELOW = {"first_k_dense_replace": 0, "num_dense_layers": 0, "moe_layer_start_index": 0, "moe_layer_end_index": 1}


TABLES = [{kind: asdict(family) for kind, family in FAMILIES.items()}, NUMBERS, BELOW]  # all that `reading` reads


def reading(config: Any) -> dict[str, Any]:
    """What the tables say of a model with this config, as plain values."""
    family = FAMILIES.get(config.model_type)
    return {
        "family": asdict(family or Family()),
        "written": (family or Family()).written,
        "branches": family is not None,
        "numbers": [name for name in NUMBERS if hasattr(config, name)],
        "below": {name: shift for name, shift in BELOW.items() if hasattr(config, name)},
    }
