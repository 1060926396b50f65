"""Models on disk merged tensor by tensor: no model is ever in memory as a whole."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from sddx.errors import UserError
from sddx.merging.methods import Merged, Place

INDEX = "model.safetensors.index.json"
Method = Callable[..., Merged]


def shards(folder: Path) -> dict[str, list[str]]:
    """The tensors' names in each file of weights of a model folder."""
    by_file = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            by_file[path.name] = sorted(file.keys())
    return by_file


def merge_files(
    parents: Sequence[Path], base: Path, out: Path, method: Method, tick: Callable[[int], Any] = lambda count: None
) -> Counter[str]:
    """Write the merged weights into `out`, shard by shard as those of the first of `parents`; all are folders with
    safetensors. `tick` is given the number of tensors that were written. Returns how many tensors took which way.

    Raises UserError, before a tensor is read, where names, shapes or dtypes differ; and where what the method gives
    is not `sound`."""
    models = [_Tensors(folder) for folder in (*parents, base)]
    _require_alike(models)
    ways: Counter[str] = Counter()
    for file in shards(parents[0]):
        with open(out / file, "wb") as written:
            for name in _begun(parents[0] / file, written):
                *students, origin = (model.read(name) for model in models)
                merged, way = sound(method(students, origin, _place(name)), origin, name)
                written.write(merged.contiguous().reshape(-1).view(torch.uint8).numpy())
                ways[way] += 1
                tick(1)
    if (parents[0] / INDEX).is_file():
        (out / INDEX).write_text((parents[0] / INDEX).read_text(encoding="utf-8"), encoding="utf-8")
    return ways


def sound(made: Any, origin: torch.Tensor, name: str) -> Merged:
    """What a method made of the tensors of one name, which takes the place of `origin`. Raises UserError unless it
    is a tensor like it, of finite numbers, and the way that was taken, a text."""
    merged, way = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(merged, torch.Tensor) or not isinstance(way, str):
        raise UserError("merging.method must return a tensor and the way that it took, a text: (merged, 'line').")
    if (merged.dtype, merged.shape) != (origin.dtype, origin.shape):
        given, wanted = (f"{each.dtype} {list(each.shape)}" for each in (merged, origin))
        raise UserError(f"merging.method made {given} of {name}, and its students have {wanted}. Return the like.")
    # The least and the largest are NaN where one is, and take no copy of the tensor as `isfinite` of it does.
    if merged.numel() and not all(each.isfinite() for each in merged.aminmax()):
        raise UserError(f"merging.method made numbers of {name} that are not finite. Nothing was merged.")
    return merged, way


def _begun(alike: Path, file: BinaryIO) -> list[str]:
    """Begin a file of weights with the header of another one, so that no more than a tensor need be held: its
    tensors' names, in the order in which their bytes follow."""
    with open(alike, "rb") as other:
        size = other.read(8)
        header = other.read(int.from_bytes(size, "little"))
    file.write(size + header)
    places = {name: each["data_offsets"] for name, each in json.loads(header).items() if name != "__metadata__"}
    return sorted(places, key=places.__getitem__)


class _Tensors:
    """The tensors of a folder, read one at a time: a file is mapped as long as a tensor of it is held."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {name: folder / file for file, names in shards(folder).items() for name in names}

    def read(self, name: str) -> Any:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: shape for path in set(self._files.values()) for name, shape in _shapes(path)}


def _shapes(path: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            tensor = file.get_slice(name)
            yield name, (tensor.get_dtype(), tuple(tensor.get_shape()))


def _require_alike(models: Sequence[_Tensors]) -> None:
    first = models[0].shapes()
    for other in models[1:]:
        if wrong := list(_differences(first, other.shapes())):
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise UserError(
                f"{other.folder.name} and {models[0].folder.name} cannot be merged: {wrong[0]}{more}. Merge "
                "students of one base model, one cut and one dtype."
            )


def _differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            yield f"only one of them has {name}"
        elif one[name] != other[name]:
            yield f"{name} is {_said(*other[name])} in one and {_said(*one[name])} in the other"


def _said(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


def _place(name: str) -> Place:
    match = re.search(r"\.(\d+)\.", name)
    return Place(name, int(match[1]) if match else None)
