"""`sddx store why`: which setting, definition or input makes an artifact another one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sddx.errors import UserError
from sddx.run_folder import folder_of, read_config
from sddx.store import manifest

ABSENT = "(absent)"


def of_run(path: Path, root: Path | None) -> int:
    """Prints of every stage of a run's configuration whether the store has it and, where not, in what its recipe
    differs from the nearest artifact there; of the store at `root`, or the run's own. Raises UserError for a folder
    that holds no configuration of a run."""
    from sddx.train import check_settings, look

    config = read_config(folder_of(path))
    check_settings(config)
    plan = look(config if root is None else config | {"store": str(root)})
    artifacts = {fields["key"]: fields for _, fields in manifest.artifacts(manifest.folders(plan.root))}
    to_build = {step.key for step in plan.steps if not step.present}
    for step in plan.steps:
        print(f"{step.stage} {step.key[:12]}: {'in the store' if step.present else 'to be built'}")
        for line in _from_nearest(step.recipe, artifacts, to_build) if not step.present else ():
            print(f"  {line}")
    return 0


def _from_nearest(
    recipe: dict[str, Any], artifacts: dict[str, dict[str, Any]], to_build: set[str]
) -> Iterable[str]:
    """What differs from the artifact of this stage that differs in least; of inputs that are to be built, that
    they are."""
    waits = [f"its input {_input(entry)} is to be built" for entry in recipe["inputs"] if entry["key"] in to_build]
    same = [fields for fields in artifacts.values() if fields["stage"] == recipe["stage"]]
    listed = [list(_differences(fields, recipe, {}, "")) for fields in same]
    if not listed:
        return [*waits, "the store has no artifact of this stage yet"]
    return [*waits, *(line for line in min(listed, key=len) if not (waits and line.startswith("input:")))]


def of_keys(root: Path, a: str, b: str) -> int:
    """Prints every setting, source and input in which two artifacts differ, and goes on into their inputs."""
    artifacts = {fields["key"]: fields for _, fields in manifest.artifacts(manifest.folders(root))}
    lines = list(_differences(_only(artifacts, a), _only(artifacts, b), artifacts, ""))
    print("\n".join(lines) or "the recipes are the same")
    return 0


def _only(artifacts: dict[str, dict[str, Any]], prefix: str) -> dict[str, Any]:
    keys = [key for key in artifacts if key.startswith(prefix)]
    if len(keys) != 1:
        problem = f"{len(keys)} artifacts have a key" if keys else "no artifact has a key"
        raise UserError(f"{problem} that starts with {prefix!r}; `sddx store ls` lists the keys")
    return artifacts[keys[0]]


def _differences(
    a: dict[str, Any], b: dict[str, Any], artifacts: dict[str, dict[str, Any]], indent: str
) -> Iterator[str]:
    """Lines `what: in a | in b`, those about the inputs' own recipes indented."""
    if a["stage"] != b["stage"]:
        yield f"{indent}stage: {a['stage']} | {b['stage']}"
    for name, left, right in _unequal(_flat(a["spec"]), _flat(b["spec"])):
        yield f"{indent}spec {name}: {left} | {right}"
    for name, left, right in _unequal(*_unlike(a["sources"], b["sources"])):
        yield f"{indent}source {name}: {left[:12]} | {right[:12]}"
    for one, other in zip_longest(a["inputs"], b["inputs"]):
        if one != other:
            yield f"{indent}input: {_input(one)} | {_input(other)}"
            below = [artifacts.get(entry["key"]) for entry in (one, other) if entry]
            if len(below) == 2 and below[0] and below[1]:
                yield from _differences(below[0], below[1], artifacts, indent + "  ")


def _unlike(a: dict[str, str], b: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Both sources without what stands in both, wherever it stands: a definition that moved is the same."""

    def known(sources: dict[str, str]) -> set[tuple[str, str]]:
        return {(where.rpartition(":")[2], digest) for where, digest in sources.items()}

    both = known(a) & known(b)
    first, second = (
        {where: digest for where, digest in each.items() if (where.rpartition(":")[2], digest) not in both}
        for each in (a, b)
    )
    return first, second


def _unequal(a: dict[str, str], b: dict[str, str]) -> list[tuple[str, str, str]]:
    """Each name whose entries differ, with both."""
    pairs = [(name, a.get(name, ABSENT), b.get(name, ABSENT)) for name in sorted(a.keys() | b.keys())]
    return [(name, left, right) for name, left, right in pairs if left != right]


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """The leaves of nested settings as JSON, by dotted name."""
    if not isinstance(value, (dict, list)) or (name and not value):
        return {name: json.dumps(value)}
    leaves: dict[str, str] = {}
    entries = value if isinstance(value, dict) else dict(enumerate(value))
    for key, entry in entries.items():
        leaves |= _flat(entry, f"{name}.{key}" if name else str(key))
    return leaves


def _input(entry: dict[str, str] | None) -> str:
    return f"{entry['stage']} {entry['key'][:12]}" if entry else ABSENT
