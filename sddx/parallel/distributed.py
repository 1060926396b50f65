"""One piece of work in several processes: what they share out, sum up, and hold a part of each.

In a training they see the same steps, share out their micro-batches and stay alike. What a step's terms are divided
by are totals of the whole step (`Totals`). So gradients and values of the processes are summed, not averaged, and
are those of one process up to the order of the sums. Where nothing is trained all of them do the very same, each
with a shard of the weights (`shard_apart`). Everything here but sharding may be called without a process group; it
is then one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Part = TypeVar("Part")


def is_joined() -> bool:
    """Whether this process is one of a group."""
    return dist.is_initialized()


def world() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Waits until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def share(parts: Sequence[Part]) -> list[tuple[int, Part, float]]:
    """This process's parts of a step, as (number in the step, part, weight).

    All processes get equally many, because with shards each pass needs all of them. One for which none is left
    repeats the first part with weight 0: its values and gradients are 0.
    """
    numbers = range(rank(), -(-len(parts) // world()) * world(), world())
    return [(n, parts[n], 1.0) if n < len(parts) else (0, parts[0], 0.0) for n in numbers]


def summed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each value (a scalar) summed over the processes."""
    if not dist.is_initialized():
        return values
    stacked = torch.stack(list(values.values()))
    dist.all_reduce(stacked)
    return dict(zip(values, stacked.unbind(), strict=True))


def any_of_us(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    return bool(summed({"flag": torch.tensor(float(flag), device=device)})["flag"].item())


def sum_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its sum over the processes; shards are summed already, in the backward pass."""
    if not dist.is_initialized():
        return
    for weight in weights:
        if not _is_sharded(weight):
            # A weight that no example here reached, such as an expert's, may have been reached elsewhere.
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(weight.grad)


def agreed(value: Part) -> Part:
    """What the first process has, in all of them: which passes come next must not hang on rounding."""
    held = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(held, src=0)
    return held[0]


def shard(module: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Cuts every weight of the module into one shard a process (FSDP2), in place and onto the device.

    `blocks` are gathered one at a time, when they run, inside of a pass through `module` or alone; what else the
    module holds (embeddings, norm and head) is gathered for the whole pass. Passes must go through
    `module(...)`, since weights are not whole outside of it.
    """
    _cut([*dict.fromkeys(blocks), module], device, 1.0)  # gradients are summed


class _Beside(nn.Module):
    """Modules that are each called for themselves."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.held = nn.ModuleList(modules)

    def forward(self, nothing: Tensor) -> Tensor:
        return nothing


def shard_apart(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Cuts the weights of blocks into one shard a process, in place and onto the device, for passes in which all
    processes do the very same.

    A block is gathered whenever it is called, in any order and inside of whatever model: no pass has to go through
    a module around them. What is not in a block (embeddings, norm and head) is left whole, where it is. A gradient
    is the mean over the processes, which is that of one.
    """
    beside = _Beside(dict.fromkeys(blocks))
    _cut([*beside.held, beside], device, float(world()))
    beside(torch.zeros((), device=device))  # now they have one stream to be gathered in, and one pool of memory


def _cut(parts: Iterable[nn.Module], device: torch.device, divide: float) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world(),))
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        part.set_gradient_divide_factor(divide)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def _is_sharded(value: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def whole(value: Any) -> Any:
    """A sharded tensor put together, in host memory; anything else as it is. All processes call it."""
    return value.full_tensor().cpu() if _is_sharded(value) else value


def as_in(weight: Any, value: Any) -> Any:
    """A whole tensor, cut as the weight is that it belongs to."""
    if not _is_sharded(weight) or not isinstance(value, Tensor) or value.shape != weight.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    local = value.to(weight.device)
    return distribute_tensor(local, weight.device_mesh, weight.placements, src_data_rank=None)


def of_optimizer(state: dict[str, Any], change: Callable[[int, Any], Any]) -> dict[str, Any]:
    """An optimiser's state, each entry replaced by `change(number of its weight, entry)`."""
    changed = {n: {k: change(n, v) for k, v in entries.items()} for n, entries in state["state"].items()}
    return state | {"state": changed}


def put_together(model: nn.Module, *, frozen: bool) -> None:
    """Makes the trained weights of a sharded model, and the frozen ones if asked, whole again in process 0, where
    they can be saved. The model cannot run any more. All processes call it."""
    put: dict[int, nn.Parameter] = {}
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        if not _is_sharded(weight) or not (weight.requires_grad or frozen):
            continue
        if id(weight) not in put:  # tied weights stay tied
            full = whole(weight.detach())
            put[id(weight)] = weight if rank() else nn.Parameter(full, weight.requires_grad)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, put[id(weight)])
