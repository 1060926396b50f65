"""What decides a stage's result, as text that can be hashed: its settings, its inputs and its source.

Source is compared as a syntax tree, so that comments, docstrings and layout cost nothing. A module's source
is read once a process and the first reading stands, because the code that runs is the code that was loaded.
Imports by name at run time (`importlib.import_module`) are not seen; a `_target_` in the settings is. Of what
others wrote, a `_target_` counts by its version, and so do the packages in `VERSIONED` wherever they are imported.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from math import isfinite
from pathlib import Path
from typing import Any

from sddx.records import Artifact, UserError

PACKAGE = Path(__file__).resolve().parents[1]
# Smaller files are always read: a rewrite within one tick of the clock keeps size and time.
SMALL = 16 * 2**20
# Packages whose releases decide more than how exactly something is computed: lm-eval's hold the tasks themselves.
VERSIONED = ("lm_eval",)
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Recipe:
    """Everything that may change a stage's numbers. `origins` maps the name of each first-party source to its
    file, and each third-party `_target_` or package in `VERSIONED` to the version of its distribution."""

    stage: str
    spec: dict[str, Any]
    inputs: tuple[tuple[str, str], ...]
    origins: dict[str, Path | str]

    @property
    def sources(self) -> dict[str, str]:
        """The digest of each source file, and each third-party version."""
        return {name: _read(at).digest if isinstance(at, Path) else at for name, at in self.origins.items()}

    @property
    def settings(self) -> str:
        """The digest of all but the sources; artifacts that differ in their sources alone share it."""
        return digest([self.stage, self.spec, [key for _, key in self.inputs]])

    @property
    def key(self) -> str:
        return digest([self.settings, self.sources])

    def edited(self) -> list[str]:
        """The source files that are no longer as this process first read them."""
        return [name for name, at in self.origins.items() if isinstance(at, Path) and _edited(at)]


def recipe(stage: Callable[..., Any], inputs: Collection[Artifact], spec: dict[str, Any]) -> Recipe:
    """The recipe of the call `stage(out, *inputs, **spec)`.

    Raises TypeError where a value of `spec` has no plain JSON form,
    UserError where a `_target_` is not found.
    """
    settings = {key: plain(value, key) for key, value in spec.items()}
    origins = stage_origins(stage)
    for target in _targets(settings):
        origins = origins | target_origins(target)
    named = tuple((artifact.stage, artifact.key) for artifact in inputs)
    return Recipe(stage.__name__, settings, named, dict(sorted(origins.items())))


def digest(value: Any) -> str:
    """SHA-256 (hex) of a plain value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any, name: str) -> Any:
    """`value` with its tuples as lists; TypeError names the entry (`name`) that JSON cannot hold exactly."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(entry, f"{name}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, f"{name}.{place}") for place, entry in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and isfinite(value)):
        return value
    raise TypeError(
        f"the setting '{name}' cannot be hashed: {value!r} is a {type(value).__name__}; "
        "give text, a finite number, true or false, null, or lists and mappings (with text keys) of these"
    )


def _targets(value: Any) -> Iterator[str]:
    """Every `_target_` anywhere in a plain value."""
    if isinstance(value, dict):
        if isinstance(value.get("_target_"), str):
            yield value["_target_"]
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _targets(entry)


def stage_origins(stage: Callable[..., Any]) -> dict[str, Path | str]:
    """The file of the stage and of every first-party module that it imports, directly or not, and the version of
    each package in `VERSIONED` that any of them imports."""
    module = sys.modules[stage.__module__]
    file = inspect.getsourcefile(stage)
    if file is None or not Path(file).is_file():
        raise TypeError(f"the stage {stage.__name__} must be a function in a file: its source is hashed")
    name = module.__spec__.name if module.__spec__ else Path(file).stem
    return _closure(name, Path(file).resolve())


def target_origins(target: str) -> dict[str, Path | str]:
    """What stands for a `_target_`: the file of its module and of all that this imports where it is
    first-party (sddx, or outside site-packages and the standard library), else its distribution's version."""
    top = target.partition(".")[0]
    home = PACKAGE.parent if top == PACKAGE.name else _home(top, target)
    if home is None or (top != PACKAGE.name and _third_party(home)):
        return {target: _version(top)}
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if path := _file(module, home):
            return _closure(module, path)
    raise UserError(f"_target_: {target} is in no module under {home}; give the full dotted name")


def _home(top: str, target: str) -> Path | None:
    """The folder in which Python finds the module or package `top`; None for what is built in."""
    found = util.find_spec(top)
    if found is None:
        raise UserError(f"_target_: {target} cannot be imported: no module {top}; mend or install it")
    if found.submodule_search_locations:
        return Path(next(iter(found.submodule_search_locations))).resolve().parent
    return Path(found.origin).resolve().parent if found.has_location and found.origin else None


def _third_party(folder: Path) -> bool:
    libraries = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    installed = {"site-packages", "dist-packages"} & set(folder.parts)
    return bool(installed) or any(folder.is_relative_to(Path(library).resolve()) for library in libraries)


@cache
def _version(top: str) -> str:
    """The version of the distribution that a third-party module belongs to."""
    if top in sys.stdlib_module_names:
        return f"python {sys.version_info.major}.{sys.version_info.minor}"
    try:
        return metadata.version(top)
    except metadata.PackageNotFoundError:
        owners = sorted(set(metadata.packages_distributions().get(top, [])))
        return ", ".join(f"{owner} {metadata.version(owner)}" for owner in owners) or "unknown version"


@cache
def _closure(module: str, path: Path) -> dict[str, Path | str]:
    """The first-party files behind a module, by their path relative to where their package lies, and the versions
    of what in `VERSIONED` they import.

    Followed are imports of sddx and, for code outside sddx, of what lies in the same folder as its
    top-level package; a module brings the packages that hold it, as Python runs them too.
    """
    home = path.parents[module.count(".") + (path.name == "__init__.py")]
    pending = {module: path}
    files: dict[str, Path] = {}
    versions: dict[str, Path | str] = {}
    while pending:
        module, path = pending.popitem()
        files[module] = path
        names = _imported(module, path)
        versions |= {name: _version(name) for name in names.intersection(VERSIONED)}
        for name in names:
            if name not in files and (file := _file(name, home)):
                pending[name] = file
    roots = {file: PACKAGE.parent if file.is_relative_to(PACKAGE) else home for file in files.values()}
    return versions | {file.relative_to(root).as_posix(): file for file, root in roots.items()}


def _file(module: str, home: Path) -> Path | None:
    """The source file of a first-party module; None for what is not followed.

    The root of sddx holds the version and the way in, `runtime` and `store` change no number.
    """
    first, *rest = module.split(".")
    if first == PACKAGE.name:
        if not rest or rest[0] in ("runtime", "store"):
            return None
        home = PACKAGE.parent
    elif _third_party(home):
        return None
    base = home.joinpath(first, *rest)
    files = (base / "__init__.py", base.with_name(base.name + ".py"))
    return next((file for file in files if file.is_file()), None)


def _imported(module: str, path: Path) -> set[str]:
    """The absolute names that a module's import statements may load, with the packages above each."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = set()
    for level, name in _read(path).imports:
        above = package[: len(package) - level + 1] if level else []
        parts = above + name.split(".")
        names |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return names


@dataclass(frozen=True)
class _Source:
    """A module's digest, its imports at any depth as (relative level, dotted name), its time of change."""

    digest: str
    imports: tuple[tuple[int, str], ...]
    mtime_ns: int


@cache
def _read(path: Path) -> _Source:
    return _parse(path)


def _parse(path: Path) -> _Source:
    mtime_ns = path.stat().st_mtime_ns
    tree = _Bare().visit(ast.parse(path.read_bytes()))
    imports = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from a import b` may load the module a.b
            stem = f"{node.module}." if node.module else ""
            imports |= {(node.level, stem + alias.name) for alias in node.names}
    # unparsed text, because the tree's own dump differs between versions of Python
    text = ast.unparse(tree)
    return _Source(hashlib.sha256(text.encode()).hexdigest(), tuple(sorted(imports)), mtime_ns)


def _edited(path: Path) -> bool:
    if not path.is_file():
        return True
    return path.stat().st_mtime_ns != _read(path).mtime_ns and _parse(path).digest != _read(path).digest


def read_package() -> None:
    """Reads the source of all of sddx, so that keys speak of the code that this process started with."""
    for path in PACKAGE.rglob("*.py"):
        _read(path)


class _Bare(ast.NodeTransformer):
    """Drops docstrings and every other text that stands alone as a statement."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        bare = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if bare else self.generic_visit(node)


def checksum(path: Path, known: dict[str, Any] | None = None) -> str:
    """SHA-256 (hex) of a file's bytes. A large file is not read where the hub's cache names it by its checksum, nor
    again where its size and time of change are those of `known` (`size`, `mtime_ns`, `sha256`)."""
    stat = path.stat()
    if stat.st_size >= SMALL:
        blob = path.resolve()
        if blob.parent.name == "blobs" and SHA256.fullmatch(blob.name):
            return blob.name
        if known is not None and (stat.st_size, stat.st_mtime_ns) == (known["size"], known["mtime_ns"]):
            return known["sha256"]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record(path: Path, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file's checksum, its size in bytes and its time of change in nanoseconds."""
    stat = path.stat()
    return {"sha256": checksum(path, known), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
