"""A model where it lies on this machine: in a folder, in a GGUF file, or in the file of its package. Importing this
module is cheap."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sddx.gguf.packaged import package_of
from sddx.runtime import Runtime
from sddx.store import Store, default_root


def located(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose model is a folder or a hub id, and whose dtype is a dtype: a GGUF file (also that of
    the model's package, where it is here and the hub's model is not) is converted once into the store, and so is
    that of a teacher; the dtype `auto` is the folder's own. Raises UserError for a file that cannot be converted,
    and for a dtype that cannot be known yet."""
    model, store, teacher = config.get("model"), config.get("store"), config.get("teacher")
    if not isinstance(model, Mapping) or not isinstance(model.get("path"), str):
        return config  # which is told, with all other mistakes, by the check of all settings
    path, revision = _unpacked(_file_of(model), store), model.get("revision")
    dtype = _own_dtype(path, revision) if model.get("dtype") == "auto" else model.get("dtype")
    other = _unpacked(teacher, store) if isinstance(teacher, str) else teacher
    settings = {**config, "model": {**model, "path": path, "dtype": dtype}, "teacher": other}
    return settings | ({"merging": _students_located(config["merging"], store)} if config.get("merging") else {})


def _students_located(merging: Mapping[str, Any], store: str | None) -> dict[str, Any]:
    """The runs whose students are merged, with their models found as that of the run itself is."""
    students = [
        located({**each, "store": store}) if isinstance(each, Mapping) else each for each in merging["students"]
    ]
    apart = [
        {name: each[name] for name in each if name != "store"} if isinstance(each, dict) else each
        for each in students
    ]
    return {**merging, "students": apart}


def _file_of(model: Mapping[str, Any]) -> str:
    """The path of a model; where neither a folder nor the hub's cache has it, that of its package's file."""
    package = package_of(model)
    if package is None or not package.place.is_file():
        return str(model["path"])
    from sddx.models.load import is_here  # seconds, which most commands need not wait for

    return str(model["path"] if is_here(model["path"], model.get("revision")) else package.place)


def _unpacked(path: str, root: str | None) -> str:
    """The path; of a GGUF file, that of the folder in the store which it is converted to."""
    if not path.lower().endswith(".gguf"):
        return path
    from sddx.gguf.convert import FOLDER, convert
    from sddx.gguf.model import require_readable

    require_readable(file := Path(path).expanduser())
    store = Store(Path(root or default_root()))
    return str(store.build(convert, {"file": store.source("gguf", file)}, runtime=Runtime()).path / FOLDER)


def _own_dtype(path: str, revision: str | None) -> str:
    from sddx.models.load import is_here, locate, own_dtype, stated_dtype

    here = is_here(path, revision)
    return own_dtype(locate(path, revision=revision)[0]) if here else stated_dtype(path, revision)
