"""Run a model's body and hand out what losses and metrics need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from sddx.models.anatomy import blocks, decoder, head
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
        # A block returns a bare tensor since transformers 5, and a tuple that begins with it before.
        states.append(output if isinstance(output, torch.Tensor) else output[0])

    stack = blocks(model)
    handles = [stack[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [block.register_forward_hook(leave) for block in stack]
    try:
        yield states
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
