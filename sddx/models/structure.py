"""Where a model keeps its parts, found by one traced pass: no table has to say it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sddx.errors import UserError
from sddx.models.narrow import refusals, smallest

TOKENS = 2


@dataclass(frozen=True)
class Layout:
    """Paths from a causal language model to its parts: the body (token ids to final hidden state), the list of its
    blocks, what runs between the last block and the end of the body (None: nothing, or more than one module), the
    head."""

    body: str
    blocks: str
    norm: str | None
    head: str


_layouts: dict[type, Layout] = {}


def layout(whole: Any) -> Layout:
    """The layout of a causal language model, the same for all of its class: found once in a process, on a narrow
    model of this config or, where there is none, on the model itself. Raises UserError where there are no such
    parts."""
    kind = next(each for each in type(whole).__mro__ if not each.__name__.startswith("FSDP"))
    if kind not in _layouts:
        _layouts[kind] = traced(_small(kind, whole))
    return _layouts[kind]


def _small(kind: Any, whole: Any) -> Any:
    """A narrow model of the class with random weights that runs, else the model itself."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("cpu"):
                model = kind(smallest(whole.config)).eval()
            _run(model)
        except UserError:
            return whole
        except refusals():
            return whole
    return model


def _run(model: Any) -> None:
    device = next(model.parameters()).device
    with torch.no_grad():
        model(input_ids=torch.ones(1, TOKENS, dtype=torch.long, device=device), use_cache=False)


def traced(model: Any) -> Layout:
    """The layout of a causal language model by the order of calls in one pass: the blocks are the list of modules,
    as many as the config says, that are called one after the other, and hold most of the weights.

    Raises UserError where there is no such list, no body around it, or no head."""
    names = {module: name for name, module in model.named_modules()}
    begun, outputs = _calls(model, names)
    name, head = type(model).__name__, names.get(model.get_output_embeddings())
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [each for each in _in_order(names, begun) if len(each) == depth]
    if head is None or not lists:
        raise UserError(
            f"blocks cannot be found in a {name}: a decoder-only language model is needed, with a head and a list "
            f"of {depth} blocks that run one after the other. Use another model."
        )
    blocks = max(lists, key=lambda each: sum(weight.numel() for weight in each.parameters()))
    bodies = [each for each in names if _is_body(each, outputs) and names[blocks].startswith(f"{names[each]}.")]
    if not bodies:
        raise UserError(
            f"no body is around the blocks of a {name}: one that gives the final hidden state of token ids."
        )
    body = max((names[each] for each in bodies), key=len)
    return Layout(body, names[blocks], _after(begun, names[blocks], body, head), head)


def _calls(model: Any, names: dict[Any, str]) -> tuple[list[str], dict[Any, Any]]:
    """The names of modules in the order in which a pass enters them, and what each gave last."""
    begun: list[str] = []
    outputs: dict[Any, Any] = {}
    handles = []
    for module, name in names.items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: begun.append(name)))
        handles.append(module.register_forward_hook(lambda each, _, output: outputs.__setitem__(each, output)))
    try:
        _run(model)
    finally:
        for handle in handles:
            handle.remove()
    return begun, outputs


def _in_order(names: dict[Any, str], begun: list[str]) -> list[nn.ModuleList]:
    """The lists of modules whose members a pass entered once each, in their order."""
    lists = []
    for module, name in names.items():
        if isinstance(module, nn.ModuleList):
            members = [f"{name}.{number}" for number in range(len(module))]
            if [each for each in begun if each in set(members)] == members:
                lists.append(module)
    return lists


def _is_body(module: nn.Module, outputs: dict[Any, Any]) -> bool:
    """Whether a module makes final hidden states of token ids."""
    takes = inspect.signature(module.forward).parameters
    return hasattr(outputs.get(module), "last_hidden_state") and "input_ids" in takes and "inputs_embeds" in takes


def _after(begun: list[str], blocks: str, body: str, head: str) -> str | None:
    """What of the body is entered after the last block, if it is one module (with those inside it)."""
    last = max(place for place, name in enumerate(begun) if name.startswith(f"{blocks}."))
    after = [name for name in begun[last + 1 :] if name.startswith(f"{body}.") and name != head]
    outer = [name for name in after if not any(name.startswith(f"{other}.") for other in after)]
    return outer[0] if len(set(outer)) == 1 else None
