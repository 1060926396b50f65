"""What numbers settings can be, by the name that they have wherever they stand, and what their types allow."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sddx.errors import near

COUNTS = """
    accumulate batch_size checkpoint_every context count data_parallel devices head_chunk items limit log_every
    jobs max_length max_model_len max_new_tokens new_tokens order orders pool rank rows sequences size steps
    tensor_parallel texts tokens validate_every width
""".split()
FROM_0 = """
    epochs lowest min_characters remove ridge shots temperature top_k until validation weight
    weight_decay
""".split()
ABOVE_0 = "alpha clip poll learning_rate gpu_hours gpu_memory_utilization top_p".split()
SHARES = "beta chance dropout gpu_memory_utilization keep shift top_p warmup".split()
SEEDS = ("seed",)
NOT_EMPTY = ("tasks",)
KINDS = {
    "int": int,
    "float": (int, float),
    "str": str,
    "bool": bool,
    "list": list,
    "dict": Mapping,
    "Mapping": Mapping,
    "Sequence": list,
    "None": type(None),
}

WORDS = {
    "int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "list": "a list",
    "dict": "a group of settings", "Mapping": "a group of settings", "Sequence": "a list", "None": "null",
}  # fmt: skip


def out_of_range(where: str, name: str, value: Any, annotation: str = "float") -> Iterator[str]:
    """What is wrong with a setting of this name; of one that is given by task, with each of its values. Where words
    alone are allowed, one name may be a word that is a number elsewhere (`tokens`)."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from out_of_range(f"{where}.{key}", name, each, annotation)
    elif name in NOT_EMPTY and value in ([], ()):
        yield f"{where} is empty. Name one at least."
    elif isinstance(value, str) and not ("int" in annotation or "float" in annotation):
        return
    elif value is not None and (allowed := _allowed(name, value)):
        yield f"{where}={value!r} must be {allowed}."


def _allowed(name: str, value: Any) -> str | None:
    """What a setting may be, where it is not."""
    if name in SEEDS:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return None if whole and 0 <= value < 2**32 else f"a whole number from 0 to {2**32 - 1}"
    if name not in (*COUNTS, *FROM_0, *ABOVE_0, *SHARES):
        return None
    lowest = 1 if name in COUNTS else 0
    bounds = f"above {lowest}" if name in ABOVE_0 else f"{lowest} or more"
    bounds += " and at most 1" if name in SHARES else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"a number, {bounds}"
    if isinstance(value, int) and value >= 2**63:
        return "a number that 64 bits can hold"
    within = (value > lowest if name in ABOVE_0 else value >= lowest) and not (name in SHARES and value > 1)
    return None if within and math.isfinite(value) else bounds


def wrong_type(where: str, parameter: inspect.Parameter, value: Any) -> Iterator[str]:
    """Whether a value is not what its parameter is annotated as: one of some words, of plain types, or what a
    `_target_` makes."""
    annotation = str(parameter.annotation)
    if annotation.startswith("Literal["):
        allowed = ast.literal_eval(annotation.removeprefix("Literal"))
        if value not in allowed:
            words = list(dict.fromkeys(map(str, allowed)))
            yield f"{where}={_shown(value)} must be {' or '.join(words)}.{near(str(value), words, '')}"
        return
    names = _plain(annotation).split(" | ")
    if not set(names) <= KINDS.keys():
        yield from no_node(where, annotation, value)
        return
    if (held := re.search(r"(?:Mapping|dict)\[str, (.*?)\](?: \||$)", annotation)) and isinstance(value, Mapping):
        for key, each in value.items():
            yield from _of_kind(f"{where}.{key}", held[1], each)
        return
    yield from _of_kind(where, annotation, value)
    if isinstance(value, list) and re.match(r"(?:list|Sequence)\[str\]", annotation):
        if odd := [each for each in value if not isinstance(each, str)]:
            yield f"{where} holds {', '.join(map(_shown, odd))}, and texts alone are allowed."


def _of_kind(where: str, annotation: str, value: Any) -> Iterator[str]:
    """Whether a value is of the plain kinds in an annotation, or made by a `_target_` where that names another."""
    names = _plain(annotation).split(" | ")
    if "Any" in names:
        return
    if not set(names) <= KINDS.keys():
        yield from no_node(where, annotation, value)
        return
    kinds: Any = [KINDS[name] for name in names]
    if not any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind in kinds):
        yield f"{where}={_shown(value)} must be {' or '.join(WORDS[name] for name in names)}."


def no_node(where: str, annotation: str, value: Any) -> Iterator[str]:
    """What is wrong with a value where something made by a `_target_` is to stand."""
    may_lack = "Any" in annotation or "None" in annotation
    if value is None and may_lack or isinstance(value, Mapping) and "_target_" in value:
        return
    yield f"{where}={_shown(value)} must be a group of settings with its _target_, as in the files of conf/."


def _plain(annotation: str) -> str:
    """An annotation without what its containers hold: `int | Mapping | None`."""
    while annotation != (shorter := re.sub(r"\[[^\[\]]*\]", "", annotation)):
        annotation = shorter
    return annotation


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def is_ours(target: Callable) -> bool:
    """Whether the names of a target's settings are ours to know; of a command that runs as a program, too."""
    return str(getattr(target, "__module__", "")).partition(".")[0] in ("sddx", "__main__")
