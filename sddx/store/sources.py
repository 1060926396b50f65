"""Which source decides what a stage computes: the definitions that its code reaches, by their syntax.

A definition is a top-level function, class or assignment of a first-party module. The names that its code speaks of
lead to further ones, through imports at any depth; beside them count the statements that a module runs when it is
imported. Where a definition stands, and under which other names it is imported, does not count.

A definition is compared as a syntax tree without what says something to a reader or a user alone: comments,
docstrings, layout, annotations, the texts of exceptions, what is logged or printed, the names of
progress bars, and in sddx the calls of checks that raise or do nothing (`require_..`, `check_..`).

A file is read once a process and the first reading stands, because the code that runs is the code that was loaded.
What is imported by name at run time (`importlib.import_module`) is not seen. Of what others wrote, the packages in
`VERSIONED` count by their version, where a definition speaks of them.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import metadata, util
from pathlib import Path
from typing import Any

from sddx.aliases import current
from sddx.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
# Of sddx: what changes no number, and the table of families, of which a model's own entry counts with the model.
UNCOUNTED = ("runtime", "errors", "aliases", "store", "models.families")
# Packages whose releases decide more than how exactly something is computed: lm-eval's hold the tasks themselves.
VERSIONED = ("lm_eval",)
LOGGERS = ("log", "logger", "logging", "warnings")
CHECK = re.compile("_?(require|check)_")
EFFECTS = ""  # the name of what a module does when it is imported


@dataclass(frozen=True)
class Definition:
    """What a module calls `name`; with `EFFECTS`, the statements that it runs when it is imported."""

    module: Module
    name: str

    @property
    def where(self) -> str:
        """Its file, relative to where its package lies, and its name."""
        return f"{self.module.file}:{self.name}" if self.name else self.module.file

    @property
    def digest(self) -> str:
        """The digest of the statements that no comment or message is part of."""
        return self.module.digest(self.name)


@dataclass
class Module:
    """A first-party source file. Raises UserError where it is read and does not parse."""

    name: str
    path: Path
    home: Path  # the folder in which its package lies
    mtime_ns: int = field(init=False)

    def __post_init__(self) -> None:
        self.mtime_ns = self.path.stat().st_mtime_ns
        self._text = self.path.read_bytes()
        self._bare: dict[str, list[ast.stmt]] = {}
        self._digests: dict[str, str] = {}

    def __hash__(self) -> int:
        return hash(self.path)

    @cached_property
    def file(self) -> str:
        """The file, relative to where its package lies."""
        return self.path.relative_to(self.home).as_posix()

    @cached_property
    def _parsed(self) -> tuple[dict[str, list[ast.stmt]], dict[str, list[str]]]:
        """The top-level statements that bind each name, with those that do something else under `EFFECTS`; and the
        imports (see `_imports`)."""
        try:
            tree = ast.parse(self._text)
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{self.path} is not Python that can be read: {error}. Mend it.") from error
        statements: dict[str, list[ast.stmt]] = {EFFECTS: []}
        for statement in tree.body:
            for name in _bound(statement):
                statements.setdefault(name, []).append(statement)
        return statements, _imports(tree, self.name, is_package=self.path.name == "__init__.py")

    @property
    def names(self) -> list[str]:
        """What the module defines."""
        return [name for name in self._parsed[0] if name != EFFECTS]

    @property
    def imports(self) -> dict[str, list[str]]:
        """By the name that it has here, the absolute dotted names that an import may have given it."""
        return self._parsed[1]

    def bare(self, name: str) -> list[ast.stmt]:
        """The statements of a definition, without what no number hangs on."""
        if name not in self._bare:
            strip = _Bare(own=self.home == PACKAGE.parent)
            kept = [strip.visit(statement) for statement in self._parsed[0].get(name, [])]
            self._bare[name] = [statement for statement in kept if statement is not None]
        return self._bare[name]

    def digest(self, name: str) -> str:
        """The SHA-256 of a definition's `bare` statements, as text."""
        if name not in self._digests:
            # unparsed text, because the tree's own dump differs between versions of Python
            text = "\n".join(ast.unparse(statement) for statement in self.bare(name))
            self._digests[name] = hashlib.sha256(text.encode()).hexdigest()
        return self._digests[name]

    def edited(self) -> Module | None:
        """The module as it is on disk now, where that is not what was read."""
        if not self.path.is_file():
            return self
        return None if self.path.stat().st_mtime_ns == self.mtime_ns else Module(self.name, self.path, self.home)


def changed(definitions: Iterable[Definition]) -> list[Definition]:
    """Those that are no longer as this process first read them."""
    fresh: dict[Module, Module | None] = {}
    stale = []
    for one in definitions:
        if one.module not in fresh:
            fresh[one.module] = one.module.edited()
        now = fresh[one.module]
        if now is not None and (now is one.module or now.digest(one.name) != one.digest):
            stale.append(one)
    return stale


@dataclass(frozen=True)
class Reached:
    """What a name leads to: first-party definitions, and packages in `VERSIONED` or third-party ones by name."""

    definitions: frozenset[Definition]
    packages: frozenset[str]


@cache
def reached(target: str) -> Reached:
    """All that decides what the dotted name computes, itself included. Raises UserError where it leads nowhere."""
    target = current(target)
    top = target.partition(".")[0]
    home = PACKAGE.parent if top == PACKAGE.name else _home(top, target)
    if home is None or (top != PACKAGE.name and _third_party(home)):
        return Reached(frozenset(), frozenset([top]))
    first = _resolve(target)
    if not first:
        raise UserError(f"_target_: {target} is in no module under {home}; give the full dotted name")
    return _closed(set(first))


def name(target: str) -> str | None:
    """The name that the first-party definition behind a dotted name has in its module; None for others."""
    names = {one.name for one in _resolve(current(target)) if isinstance(one, Definition)} - {EFFECTS}
    return names.pop() if len(names) == 1 else None


def together(parts: Iterable[Reached]) -> Reached:
    """What any of these reaches."""
    all_parts = list(parts)
    definitions = frozenset(one for part in all_parts for one in part.definitions)
    return Reached(definitions, frozenset(top for part in all_parts for top in part.packages))


def _closed(pending: set[Definition | str]) -> Reached:
    """Everything that these lead to; what is text is a package in `VERSIONED`."""
    seen: set[Definition | str] = set()
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        if isinstance(one, Definition):
            pending |= _next(one) - seen
    definitions = frozenset(one for one in seen if isinstance(one, Definition) and one.module.bare(one.name))
    return Reached(definitions, frozenset(one for one in seen if isinstance(one, str)))


@cache
def _next(one: Definition) -> set[Definition | str]:
    """What the code of a definition speaks of, and what its module and the packages around it run on import."""
    module = one.module
    mentioned: set[Definition | str] = {Definition(module, EFFECTS)}
    if one.name == EFFECTS:
        around = [module.name.rsplit(".", cut)[0] for cut in range(1, module.name.count(".") + 1)]
        others = filter(None, map(_module, (*around, *_with_above(module.imports.values()))))
        mentioned |= {Definition(other, EFFECTS) for other in others}
    for statement in module.bare(one.name):
        for chain in _chains(statement):
            mentioned |= _in_module(module, chain)
    return mentioned


def _with_above(imports: Iterable[list[str]]) -> set[str]:
    """The modules that these imports may load, with the packages around each."""
    parts = [name.split(".") for names in imports for name in names]
    return {".".join(each[:length]) for each in parts for length in range(1, len(each) + 1)}


def _in_module(module: Module, chain: list[str]) -> set[Definition | str]:
    """What a dotted name means inside a module; nothing for a local name or a builtin."""
    meanings: set[Definition | str] = set()
    if chain[0] in module.names:
        meanings.add(Definition(module, chain[0]))
    for target in module.imports.get(chain[0], []):
        meanings |= _resolve(".".join([target, *chain[1:]]))
    for star in module.imports.get("*", []):
        if (other := _module(star)) and other is not module and chain[0] in (*other.names, *other.imports):
            meanings |= _in_module(other, chain)
    return meanings


@cache
def _resolve(dotted: str) -> frozenset[Definition | str]:
    """The definitions behind an absolute dotted name; of a module that is used otherwise than by what it
    defines, all."""
    parts = dotted.split(".")
    if parts[0] in VERSIONED:
        return frozenset([parts[0]])
    for length in range(len(parts), 0, -1):
        if (module := _module(".".join(parts[:length]))) is None:
            continue
        rest = parts[length:]
        if rest and (rest[0] in (*module.names, *module.imports) or "*" in module.imports):
            return frozenset(_in_module(module, rest))
        return frozenset(Definition(module, name) for name in (EFFECTS, *module.names))
    return frozenset()


@cache
def _module(name: str) -> Module | None:
    """The first-party module of this name; None for what is not followed."""
    top, *rest = name.split(".")
    if top == PACKAGE.name:
        dotted = ".".join(rest)
        if not rest or any(dotted == no or dotted.startswith(f"{no}.") for no in UNCOUNTED):
            return None
        home = PACKAGE.parent
    else:
        root = _home(top, name, strict=False)
        if root is None or _third_party(root):
            return None
        home = root
    base = home.joinpath(top, *rest)
    files = (base / "__init__.py", base.with_name(base.name + ".py"))
    path = next((file for file in files if file.is_file()), None)
    return Module(name, path, home) if path else None


def read_package() -> None:
    """Reads the source of all of sddx, so that keys speak of the code that this process started with."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        _module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))


def forget() -> None:
    """Read everything anew, as a new process would."""
    for known in (_module, _resolve, _next, reached, _found):
        known.cache_clear()


@cache
def _found(top: str) -> Any:
    return util.find_spec(top)


def _home(top: str, target: str, *, strict: bool = True) -> Path | None:
    """The folder in which Python finds the module or package `top`; None for what is built in."""
    try:
        spec = _found(top)
    except (ValueError, ImportError):  # a module that was made in memory has no spec
        spec = None
    if spec is None and strict:
        raise UserError(f"_target_: {target} cannot be imported: no module {top}; mend or install it")
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve().parent
    return Path(spec.origin).resolve().parent if spec.has_location and spec.origin else None


@cache
def _third_party(folder: Path) -> bool:
    libraries = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    installed = {"site-packages", "dist-packages"} & set(folder.parts)
    return bool(installed) or any(folder.is_relative_to(Path(library).resolve()) for library in libraries)


@cache
def version(top: str) -> str:
    """The version of the distribution that a third-party module belongs to."""
    if top in sys.stdlib_module_names:
        return f"python {sys.version_info.major}.{sys.version_info.minor}"
    try:
        return metadata.version(top)
    except metadata.PackageNotFoundError:
        owners = sorted(set(metadata.packages_distributions().get(top, [])))
        return ", ".join(f"{owner} {metadata.version(owner)}" for owner in owners) or "unknown version"


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a top-level statement defines; `EFFECTS` for one that does something else, or both."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)) or _is_idle(statement):
        return []
    if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = [name for target in targets for name in _assigned(target)]
        return names or [EFFECTS]
    stored = [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and _is_stored(node)]
    inner = [node.name for node in ast.walk(statement) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [EFFECTS, *stored, *inner]


def _is_stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _is_idle(statement: ast.stmt) -> bool:
    """A text alone, and what runs for type checkers or as a program."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.If) and bool(re.search("TYPE_CHECKING|__name__", ast.unparse(statement.test)))


def _assigned(target: ast.expr) -> list[str]:
    if isinstance(target, (ast.Tuple, ast.List)):
        return [name for part in target.elts for name in _assigned(part)]
    return [target.id] if isinstance(target, ast.Name) else []


def _imports(tree: ast.Module, name: str, *, is_package: bool) -> dict[str, list[str]]:
    """By the name that it binds, at any depth, the absolute dotted names that an import may give it."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    bindings: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.asname or alias.name.partition(".")[0]
                bindings.setdefault(whole, []).append(alias.name if alias.asname else whole)
                bindings.setdefault("", []).append(alias.name)  # what it loads, under no name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = stem if alias.name == "*" else f"{stem}.{alias.name}"
                bindings.setdefault(alias.asname or alias.name, []).append(target)
    return bindings


def _chains(statement: ast.AST) -> Iterator[list[str]]:
    """The dotted names in a statement, `a.b.c` as one and as long as it is."""
    pending: list[ast.AST] = [statement]
    while pending:
        node = pending.pop()
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            yield [node.id, *reversed(parts)]
        else:
            pending.extend(ast.iter_child_nodes(node))


class _Bare(ast.NodeTransformer):
    """Drops what no number hangs on. `own`: of sddx, where checks are known by their names."""

    def __init__(self, *, own: bool) -> None:
        self.own = own

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == [] and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text or self._only_tells(node.value) else self.generic_visit(node)

    def _only_tells(self, value: ast.expr) -> bool:
        if not isinstance(value, ast.Call):
            return False
        function = value.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        logs = isinstance(function, ast.Attribute) and getattr(function.value, "id", None) in LOGGERS
        return logs or getattr(function, "id", "") == "print" or (self.own and bool(CHECK.match(name)))

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        named = ast.Constant(ast.unparse(kind)) if kind is not None else None  # a text, which leads nowhere
        return ast.copy_location(ast.Raise(named, None), node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name.endswith("Error"):
            node.args, node.keywords = [], []
        if name in ("progress", "counting"):
            node.keywords = [each for each in node.keywords if each.arg not in ("what", "unit")]
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if "ClassVar" not in ast.unparse(node.annotation):  # with which it would be no field
            node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node
