"""Models on disk merged tensor by tensor: no model is ever in memory as a whole."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

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

    Raises UserError, before a tensor is read, where names, shapes or dtypes differ."""
    with ExitStack() as stack:
        models = [_Tensors(folder, stack) for folder in (*parents, base)]
        _require_alike(models)
        ways: Counter[str] = Counter()
        for file, names in shards(parents[0]).items():
            made = {}
            for name in names:
                *students, origin = (model.read(name) for model in models)
                merged, way = method(students, origin, _place(name))
                made[name] = merged.contiguous()
                ways[way] += 1
                tick(1)
            save_file(made, out / file, metadata={"format": "pt"})
    if (parents[0] / INDEX).is_file():
        (out / INDEX).write_text((parents[0] / INDEX).read_text(encoding="utf-8"), encoding="utf-8")
    return ways


class _Tensors:
    """The tensors of a folder, read one at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._files = {
            name: stack.enter_context(safe_open(folder / file, framework="pt"))
            for file, names in shards(folder).items()
            for name in names
        }

    def read(self, name: str) -> Any:
        return self._files[name].get_tensor(name)

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        slices = {name: file.get_slice(name) for name, file in self._files.items()}
        return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}


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
