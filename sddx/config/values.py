"""What a setting can be: the annotation of its parameter, with its range (`sddx.records.Count` and kin)."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import GroupedMetadata
from pydantic import ConfigDict, TypeAdapter, ValidationError

from sddx.config.build import Called
from sddx.errors import near

WORDS = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list",
    Mapping: "a group of settings", type(None): "null",
}  # fmt: skip
ITEMS = {str: "texts", int: "whole numbers", float: "numbers", list: "lists of such"}
CONTAINERS = {dict: Mapping, Mapping: Mapping, list: list, Sequence: list}
OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
LIMITS = {"ge": "{} or more", "gt": "above {}", "le": "at most {}"}
STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def annotation_of(parameter: inspect.Parameter, target: Callable) -> Any:
    """A parameter's annotation, its names looked up where the target, or a class that it builds on, is written; Any
    where one of them is known to type checkers alone."""
    for owner in (target, *getattr(target, "__mro__", ())):
        try:
            return eval(str(parameter.annotation), vars(sys.modules[owner.__module__]))
        except (NameError, SyntaxError):
            continue
    return Any


def wrong_value(where: str, annotation: Any, value: Any) -> Iterator[str]:
    """Whether a value is not what an annotation allows: one of some words, of plain types and within their ranges,
    or what a `_target_` makes; of a mapping, each of its values."""
    options = _options(annotation)
    held = next((get_args(each)[1] for each in options if _kind(each) is Mapping and get_args(each)), Any)
    if isinstance(value, Mapping) and held is not Any:
        for key, each in value.items():
            yield from wrong_value(f"{where}.{key}", held, each)
    elif all(_kind(each) in WORDS or get_origin(each) is Literal for each in options):
        yield from _wrong_plain(where, annotation, options, value)
    else:
        yield from no_node(where, value, may_lack=bool({Any, type(None)} & {*options}))


def no_node(where: str, value: Any, *, may_lack: bool = False) -> Iterator[str]:
    """What is wrong with a value where something made by a `_target_` is to stand."""
    if (value is None and may_lack) or (isinstance(value, Mapping) and "_target_" in value):
        return
    yield f"{where}={_shown(value)} must be a group of settings with its _target_, as in the files of conf/."


def _wrong_plain(where: str, annotation: Any, options: list[Any], value: Any) -> Iterator[str]:
    try:
        _adapter(annotation).validate_python(value)
        return
    except ValidationError as error:
        kinds = {each["type"] for each in error.errors()}
    if "too_short" in kinds:
        yield f"{where} is empty. Name one at least."
    elif "less_than" in kinds:
        yield f"{where}={value} must be a number that 64 bits can hold."
    elif isinstance(value, list) and (lists := [each for each in options if _kind(each) is list]):
        item = _item(lists[0])
        odd = ", ".join(_shown(each) for each in value if [*wrong_value("", item, each)])
        allowed = " or ".join(ITEMS.get(_kind(each)) or " or ".join(_words(each)) for each in _options(item))
        yield f"{where} holds {odd}, and {allowed} alone are allowed."
    else:
        bounds = [bound for each in options if (bound := _bounds(each))]
        words = bounds if kinds & OUT_OF_RANGE and bounds else [word for each in options for word in _words(each)]
        literal = [word for each in options if get_origin(each) is Literal for word in _words(each)]
        yield f"{where}={_shown(value)} must be {' or '.join(words)}.{near(str(value), literal, '')}"


def _options(annotation: Any) -> list[Any]:
    """What a union allows, one by one."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [option for each in get_args(annotation) for option in _options(each)]
    return [type(None) if annotation is None else annotation]


def _kind(annotation: Any) -> Any:
    """The plain type of an annotation, without its range; of all else, nodes among it, itself."""
    plain, *marks = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    if any(isinstance(mark, Called) for mark in marks):
        return annotation
    return CONTAINERS.get(get_origin(plain) or plain, plain)


def _item(annotation: Any) -> Any:
    """What a list may hold."""
    plain = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return (*get_args(plain), str)[0]


def _words(annotation: Any) -> list[str]:
    """What may stand there."""
    if get_origin(annotation) is Literal:
        return list(dict.fromkeys(map(str, get_args(annotation))))
    return [WORDS[_kind(annotation)]]


def _bounds(annotation: Any) -> str:
    """The range of a number in words; of 64 bits nothing is said."""
    marks = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    single = [one for mark in marks for one in (mark if isinstance(mark, GroupedMetadata) else (mark,))]
    limits = {name: getattr(one, name) for one in single for name in LIMITS if hasattr(one, name)}
    if _kind(annotation) is int and limits.keys() >= {"ge", "le"}:
        return f"a whole number from {limits['ge']} to {limits['le']}"
    return " and ".join(LIMITS[name].format(limits[name]) for name in LIMITS if name in limits)


@cache
def _adapter(annotation: Any) -> TypeAdapter:
    return TypeAdapter(annotation, config=STRICT)


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def is_ours(target: Callable) -> bool:
    """Whether the names of a target's settings are ours to know; of a command that runs as a program, too."""
    return str(getattr(target, "__module__", "")).partition(".")[0] in ("sddx", "__main__")
