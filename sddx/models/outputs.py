"""Run a model's body and hand out what losses and metrics need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from sddx.errors import UserError
from sddx.models.anatomy import (
    bare,
    blocks,
    branches,
    decoder,
    head,
    is_parallel,
    part,
    put,
    twin,
    vocabulary,
)
from sddx.models.structure import layout
from sddx.records import Outputs


@contextmanager
def block_states(model: Any) -> Iterator[list[torch.Tensor]]:
    """A list that each forward pass inside the context extends by: the input of the first block, then the
    output of every block, all [batch, time, width] and before the final norm.

    transformers' own `hidden_states[-1]` is after the final norm, which distorts every distance to it.
    """
    states: list[torch.Tensor] = []

    def enter(block: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        states.append(entering(arguments, named))

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


def entering(arguments: tuple, named: dict[str, Any]) -> torch.Tensor:
    """The hidden state that a block was called with: its first argument, or by its name."""
    return arguments[0] if arguments else named["hidden_states"]


def with_state(hidden: Any, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The same call of a block with another hidden state (None: with none, to be kept)."""
    return ((hidden, *arguments[1:]), named) if arguments else ((), {**named, "hidden_states": hidden})


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
        seen["input"] = entering(arguments, named)

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


def head_of(model: Any, projection: nn.Module | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The map from final hidden state [..., width] to logits [..., vocabulary]: all that the model's own forward
    does after its body (scaling, softcapping, biases, an adapter on the head), by running that forward with a body
    that hands through what it is given. Gradients flow. `projection` stands in for the head's own module."""
    from sddx.models.state import State

    whole, places = _passing(bare(model)), layout(bare(model))
    body = _passing(part(whole, places.body))
    body.forward = lambda *_, inputs_embeds, **__: State(last_hidden_state=inputs_embeds)
    _put_apart(whole, places.body, body)
    if projection is not None:
        _put_apart(whole, places.head, projection)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden if hidden.dim() == 3 else hidden[None]
        made = whole(inputs_embeds=rows, use_cache=False, return_dict=True).logits
        return made if hidden.dim() == 3 else made[0]

    return logits


def _put_apart(whole: Any, path: str, module: Any) -> None:
    """Put a submodule into a twin, with twins of all that is around it."""
    names = path.split(".")
    for end in range(1, len(names)):
        around = ".".join(names[:end])
        put(whole, around, twin(part(whole, around)))
    put(whole, path, module)


def _passing(module: Any) -> Any:
    """A twin without hooks, and without a forward put over that of its class: what watches, moves or gathers the
    module in a whole pass has no part in the head."""
    made = twin(module)
    vars(made).pop("forward", None)
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        vars(made)[name] = {}
    return made


def require_own_head(model: Any) -> None:
    """Raises UserError where head and body, one after the other, do not give the logits of the whole model: every
    loss would be wrong. To be asked of a model as it came, since no cut has a part in this."""
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None] % vocabulary(model)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        outputs = run(model, ids, torch.ones_like(ids))
        made = outputs.head(outputs.hidden)
    if not torch.equal(made, logits):
        raise UserError(
            f"the head of a {type(bare(model)).__name__} cannot be applied on its own: after the body it gives "
            f"other logits than the whole model, by up to {(made - logits).abs().max():.3g}. The model is as it "
            "came, so this is not about the cut. Use another model."
        )


def run(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    position_ids: torch.Tensor | None = None,
    states: bool = False,
) -> Outputs:
    """One pass through the body, without the head and without a cache; gradients flow.

    `input_ids` and `attention_mask` are [batch, time]; of texts in one flat row there are `position_ids` instead of
    a mask, [1, time], which begin at 0 with each (`models.varlen`). `outputs.head(outputs.hidden)` equals the
    model's own logits exactly. With `states`, the output of every block is kept, the last one after the final norm
    (SquareHead's convention, 2310.06927).
    """
    body = decoder(model)
    places = {"attention_mask": attention_mask} if position_ids is None else {"position_ids": position_ids}
    watched: Any = block_states(model) if states else nullcontext([])
    with watched as seen:
        hidden = body(input_ids=input_ids, **places, use_cache=False).last_hidden_state
    inner = (*seen[1:-1], hidden) if states else ()
    return Outputs(hidden, head_of(model), inner, _head_weights(model) if torch.is_grad_enabled() else ())


def _head_weights(model: Any) -> tuple[nn.Parameter, ...]:
    """What is trained of the head, which may be tied to embeddings, and of all else outside the body."""
    inside = {id(weight) for weight in decoder(model).parameters()} - {
        id(weight) for weight in head(model).parameters()
    }
    return tuple(w for w in bare(model).parameters() if w.requires_grad and id(w) not in inside)
