"""Run a model's body and hand out what losses and metrics need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from sddx.models.anatomy import blocks, branches, decoder, head, is_parallel
from sddx.records import Outputs


@contextmanager
def block_states(model: Any) -> Iterator[list[torch.Tensor]]:
    """A list that each forward pass inside the context extends by: the input of the first block, then the
    output of every block, all [batch, time, width] and before the final norm.

    transformers' own `hidden_states[-1]` is after the final norm, which distorts every distance to it.
    """
    states: list[torch.Tensor] = []

    def enter(block: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        states.append(arguments[0] if arguments else named["hidden_states"])

    def leave(block: nn.Module, arguments: tuple, output: Any) -> None:
        states.append(first(output))

    stack = blocks(model)
    handles = [stack[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [block.register_forward_hook(leave) for block in stack]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> torch.Tensor:
    """The hidden state that a module returned: bare, as most blocks do since transformers 5, or at the head of
    a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


@contextmanager
def branch_states(model: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """A list that each forward pass inside the context extends by a pair for every branch, in the order in which
    they run: the residual stream before the branch and after it, both [batch, time, width].

    Where a block's branches run in parallel, both are paired with the block's input. For models in eval mode:
    dropout between a branch and the stream is not seen.
    """
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    attention, parallel = branches(model)["attention"], is_parallel(model)
    seen: dict[str, torch.Tensor] = {}

    def enter(block: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        seen["input"] = arguments[0] if arguments else named["hidden_states"]

    def attended(module: nn.Module, arguments: tuple, output: Any) -> None:
        seen["update"] = first(output)

    def leave(block: nn.Module, arguments: tuple, output: Any) -> None:
        before, update, after = seen["input"], seen["update"], first(output)
        between = before + update
        pairs.append((before, between))
        pairs.append((before, after - update) if parallel else (between, after))

    handles = []
    for block in blocks(model):
        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(getattr(block, attention.post or attention.core).register_forward_hook(attended))
        handles.append(block.register_forward_hook(leave))
    try:
        yield pairs
    finally:
        for handle in handles:
            handle.remove()


def logits_of(projection: nn.Module, config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The map from final hidden state [..., width] to logits [..., vocabulary], with Gemma's softcapping."""
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        raw = projection(hidden)
        return raw if cap is None else torch.tanh(raw / cap) * cap

    return logits


def run(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, states: bool = False) -> Outputs:
    """One pass through the body, without the head and without a cache; gradients flow.

    `input_ids` and `attention_mask` are [batch, time]. `outputs.head(outputs.hidden)` equals the model's own
    logits exactly. With `states`, the output of every block is kept, the last one after the final norm
    (SquareHead's convention, facts C1).
    """
    body = decoder(model)
    watched: Any = block_states(model) if states else nullcontext([])
    with watched as seen:
        hidden = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    inner = (*seen[1:-1], hidden) if states else ()
    return Outputs(hidden, logits_of(head(model), body.config), inner)
