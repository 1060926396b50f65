"""The parts of a decoder-only language model. Every function sees through a peft wrapper.

Body, blocks, norm and head are found by structure (`models.structure`), the branches of blocks by a table
(`models.families`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from sddx.errors import UserError
from sddx.models.families import BELOW, BRANCHED, FAMILIES, NUMBERS, Branch, Family
from sddx.models.structure import layout

DECODER = "decoder"
INDICES = {"layer_idx", "layer_id"}  # what modules call the number by which they find their keys and values


@dataclass(frozen=True)
class Stack:
    """The blocks of a model in order, and the settings of its config that hang on which blocks there are."""

    blocks: nn.ModuleList
    settings: dict[str, Any]

    def only(self, kept: Sequence[int]) -> dict[str, Any]:
        """The settings of a model of the blocks with these numbers (ascending): of a list with one entry for each
        block theirs, of numbers those that the same blocks have now."""
        made: dict[str, Any] = {}
        for name, value in self.settings.items():
            if name in BELOW:
                end = value + BELOW[name]
                made[name] = sum(block < end for block in kept) - BELOW[name]
            elif _numbers_blocks(name, value, len(self.blocks)):
                made[name] = [place for place, block in enumerate(kept) if block in value]
            elif isinstance(value, list):
                made[name] = [value[block] for block in kept]
        if step := self.settings.get("decoder_sparse_step"):  # Qwen: all others are dense, as are those named
            dense = [n for n in range(len(self.blocks)) if (n + 1) % step or n in self.settings["mlp_only_layers"]]
            made["mlp_only_layers"] = [place for place, block in enumerate(kept) if block in dense]
            made["decoder_sparse_step"] = 1
        return made


def is_adapted(model: Any) -> bool:
    """Whether peft wraps the model. (Asked of the object, because importing peft takes seconds.)"""
    return hasattr(model, "get_base_model")


def bare(model: Any) -> Any:
    """The causal language model inside a peft wrapper; any other model is returned as it is."""
    return model.get_base_model() if is_adapted(model) else model


def twin(module: Any) -> Any:
    """A second module of the same class that shares every parameter and submodule with the first. What it is
    given or loses afterwards does not reach the first, which a shared teacher still runs."""
    made = object.__new__(type(module))  # a module in shards has other ideas of being made
    for name, value in vars(module).items():
        vars(made)[name] = copy(value) if isinstance(value, (dict, set)) else value
    return made


def family(model: Any) -> Family:
    """What the branches of this model's blocks are made of."""
    return FAMILIES.get(bare(model).config.get_text_config().model_type, Family())


def part(module: Any, path: str) -> Any:
    """The submodule at a dotted path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def put(module: Any, path: str, new: Any) -> None:
    """Put a submodule in the place of the one at a dotted path."""
    above, _, name = path.rpartition(".")
    setattr(part(module, above) if above else module, name, new)


def decoder(model: Any) -> Any:
    """The body: embeddings, blocks and final norm, without the head.

    Raises UserError where the architecture has no such shape, or cannot lose a block for a reason of its own.
    """
    whole = bare(model)
    body = part(whole, layout(whole).body)
    if reason := _unprunable(body.config):
        raise UserError(f"a {type(whole).__name__} like this cannot be pruned: {reason}. Use another model.")
    return body


def _unprunable(config: Any) -> str | None:
    """Why blocks of a model with this config cannot be taken out."""
    if getattr(config, "is_heterogeneous", False):
        return "settings of single blocks are told by the blocks' numbers (per_layer_config)"
    if shared := getattr(config, "num_kv_shared_layers", 0):
        return (
            f"its last {shared} blocks reuse keys and values of earlier blocks, found by counting from the end "
            "(num_kv_shared_layers)"
        )
    if not getattr(config, "do_layer_norm_before", True):
        return (
            "its norms stand after the residual sum (do_layer_norm_before=false, as in OPT-350m), so that no block "
            "adds an update to a stream that runs past it"
        )
    return None


def blocks(model: Any) -> nn.ModuleList:
    """The transformer blocks, in the order in which they run."""
    decoder(model)
    return part(bare(model), layout(bare(model)).blocks)


def final_norm(model: Any) -> Any:
    """What the body does after its last block: a norm, or nothing (None)."""
    path = layout(bare(model)).norm
    return None if path is None else part(bare(model), path)


def vocabulary(model: Any) -> int:
    """The number of token ids that the model knows."""
    return bare(model).config.get_text_config().vocab_size


def head(model: Any) -> nn.Module:
    """The projection from hidden state to vocabulary, before all that the model does to its logits."""
    decoder(model)
    return part(bare(model), layout(bare(model)).head)


def branches(model: Any) -> dict[str, Branch]:
    """The two residual branches of this model's blocks, in the order in which they run.

    Raises UserError where the modules of a branch cannot be told from the rest of a block.
    """
    named, kind_of_model = family(model), bare(model).config.get_text_config().model_type
    if kind_of_model not in FAMILIES:
        raise UserError(
            f"where a {type(bare(model)).__name__} keeps the branches of its blocks is not known (sddx.models."
            f"families.FAMILIES). Use pruning.units=blocks, or one of {BRANCHED}."
        )
    by_kind = {"attention": named.attention, "feedforward": named.feedforward}
    for kind, branch in by_kind.items():
        for name in filter(None, (branch.core, *branch.others, branch.post)):
            if any(name not in dict(block.named_children()) for block in blocks(model)):
                raise UserError(
                    f"the {kind} branch of a {type(bare(model)).__name__} cannot be told from the rest of its "
                    f"block ({name} is not there). Use pruning.units=blocks."
                )
    return by_kind


def is_parallel(model: Any) -> bool:
    """Whether both branches of a block read the block's input (GPT-NeoX), not one the other's output."""
    return bool(getattr(decoder(model).config, "use_parallel_residual", False))


def per_layer_lists(config: Any) -> dict[str, list]:
    """The config attributes that hold one entry per block (`layer_types` and its like), by name.

    Known by their length. A list that says something else may have that length by chance in a small model: one
    that numbers blocks is told by its name or its numbers, any other by the proof of what is left.
    """
    depth = config.num_hidden_layers
    return {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple))
        and len(value) == depth
        and not _numbers_blocks(name, value, depth)
        and name != "architectures"
        and not name.endswith(("token_id", "token_ids", "tokens"))
    }


def _numbers_blocks(name: str, value: Any, depth: int) -> bool:
    """Whether a setting lists numbers of blocks. The numbers of all are such a list, whatever it is called."""
    return isinstance(value, (list, tuple)) and (name in NUMBERS or list(value) == [*range(depth)])


def stack(model: Any) -> Stack:
    """The model's present blocks and the settings that hang on them, to be put back with `set_blocks`."""
    config = decoder(model).config
    depth = config.num_hidden_layers
    settings: dict[str, Any] = per_layer_lists(config)
    for name, value in vars(config).items():
        if _numbers_blocks(name, value, depth):
            settings[name] = list(value)
        elif isinstance(value, int) and name in (*BELOW, "decoder_sparse_step"):
            settings[name] = value
    return Stack(blocks(model), settings)


def stacks(model: Any) -> dict[str, Stack]:
    """The model's stacks of blocks by name: of a decoder-only model the one."""
    return {DECODER: stack(model)}


def put_stacks(model: Any, new: Mapping[str, Stack]) -> None:
    """Put stacks back that `stacks` gave."""
    set_blocks(model, new[DECODER])


def set_blocks(model: Any, new: Stack) -> None:
    """Put these blocks into the model, with depth, the settings that hang on blocks, and layer indices to match.

    The four go together: transformers runs `layers[:num_hidden_layers]`, some families index
    `layer_types[i]`, and the cache is addressed by each module's `layer_idx`.
    """
    whole = bare(model)
    put(whole, layout(whole).blocks, new.blocks)
    for config in (decoder(model).config, whole.config.get_text_config()):  # mostly one and the same
        config.num_hidden_layers = len(new.blocks)
        for name, value in new.settings.items():
            setattr(config, name, copy(value))
    for index, block in enumerate(new.blocks):
        for module in block.modules():
            for name in INDICES & vars(module).keys():
                setattr(module, name, index)
