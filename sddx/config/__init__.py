"""The configuration: where it is found, and the check that lists every mistake before any work starts.

Every group is a call: `_target_` and its keyword arguments. The signature is the schema: keyword-only
parameters are what YAML sets, positional ones are what the code passes (`_partial_: true`).
"""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sddx.config.build import Called, Node, build, tried
from sddx.config.parents import at_seed, named, parent
from sddx.config.values import annotation_of, is_ours, no_node, wrong_value
from sddx.errors import UserError, near
from sddx.records import STUDENTS, Count, Positive

_PACKAGE = Path(__file__).parents[1]
# An installed package carries conf/ (with sweeps/ as one of its groups) inside; a checkout has it beside it.
CONF = next(folder / "conf" for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "conf").is_dir())

FILES = ("experiment", "sweeps")  # sets of settings, which count as what they set


def surroundings(
    *,
    run: Node,
    store: str | None,
    accept: list[str],
    device: str,
    wandb: Annotated[Node, Called(1)],
    logger: Mapping[str, Node],
    dry_run: bool,
    stages: list[str] | None,
    metrics: Mapping[str, Node],
    rates: dict | None = None,
    rehearse: list[str] | None = None,
    gpu: str | None,
    probe: int | float | str | None,
    context: Count,
    budget: Mapping[str, Any],
) -> None:
    """Settings that change no number of a run, those of plans last; a signature and no more, as those below."""


def budget(*, gpu_hours: Positive | None) -> None:
    """The most that a run or a grid may take."""


def merging(*, students: list, mixed: bool, method: Node, search: Mapping[str, Any] | None = None) -> None:
    """What students are merged, and how; where shares are searched for, by `search`."""


def search(*, by: Node, evaluation: Node) -> None:
    """How the shares of a merge are searched for, and what a candidate is judged by."""


SURROUNDINGS = tuple(inspect.signature(surroundings).parameters)


def register() -> None:
    """Tell Hydra and OmegaConf what the YAML files rely on. May be called more than once."""
    OmegaConf.register_new_resolver("package", lambda: str(_PACKAGE), replace=True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it wants a package more


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values; one that is to be rehearsed with its stand-ins in it. Its `choices` hold
    whatever else was set on the command line. Raises UserError for interpolations and `???` that have none."""
    try:
        config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore
        if config.get("choices"):
            config["choices"] |= _other_choices(cfg, flatten(config))
        if config.get("merging"):
            config["merging"] = _with_students(config)
            asked = OmegaConf.to_container(cfg.merging, resolve=False)
            config["choices"] |= _merged(config, asked) if config.get("choices") else {}
        return _rehearsed(config) if config.get("rehearse") else config
    except MissingMandatoryValue:
        missing = ", ".join(sorted(OmegaConf.missing_keys(cfg)))
        raise UserError(
            f"These settings have no value: {missing}. Give each as name=value on the command line."
        ) from None
    except OmegaConfBaseException as error:
        raise UserError(unresolved(error)) from None


def _with_students(config: dict[str, Any]) -> dict[str, Any]:
    """The group `merging` with the settings of each run that it names, and what tables call it. Raises UserError
    where it lacks a setting, or has one that there is not."""
    own = [name for name in config if name not in (*SURROUNDINGS, "merging")]
    asked = config["merging"].get("students", [])
    if not isinstance(asked, list):
        raise UserError(
            f"merging.students={asked!r} is no list. Give runs by what they change here, or by folder: "
            "\"merging.students=['dataset=tiny_arithmetic','dataset=tiny_comparison']\"."
        )
    searched = config["merging"].get("search")
    wrong = [*bound("merging.search", searched, search)] if isinstance(searched, Mapping) else []
    raise_for([*bound("merging", config["merging"], merging), *wrong])
    students = [parent(student, "train", own) for student in asked]
    return {**config["merging"], "students": students, "names": [named(student) for student in asked]}


def _merged(config: Mapping[str, Any], asked: Any) -> dict[str, Any]:
    """What tells a merge from another in tables, wherever it was set. A student that the run's seed names is called
    as it was `asked` for, seed=1${seed}, so that it has one name over seeds."""
    names, method = config["merging"]["names"], config["merging"]["method"]
    given = [named(each) for each in asked["students"]] if isinstance(asked["students"], list) else names
    by_seed = [at_seed(each, config["seed"]) for each in given]
    asked_by = config["merging"].get("search")
    called = {"merging": method, **({"merging.search": asked_by["by"]} if asked_by else {})}
    return {
        **{name: str(node["_target_"]).rpartition(".")[2] for name, node in called.items()},
        **{f"merging.method.{key}": value for key, value in method.items() if not key.startswith("_")},
        STUDENTS: [asked if own == name else name for asked, own, name in zip(given, by_seed, names, strict=True)],
    }


def _rehearsed(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the stand-ins of its rehearsal in it."""
    node = config["rehearse"]
    raise_for([*no_node("rehearse", node), *_walk("rehearse", node)])
    return tried("rehearse", build(node), config)


def unresolved(error: OmegaConfBaseException) -> str:
    """An interpolation without a value, in words: what it lacks, and the setting that asks for it."""
    where = f" (in {error.full_key})" if getattr(error, "full_key", None) else ""
    message = re.sub(r"^\w+ (?:raised )?while resolving interpolation: ", "", str(error).splitlines()[0])
    return f"The settings do not go together: {message}{where}. Give the setting a value of its own."


def _other_choices(cfg: DictConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was set on the command line and is not among the choices that the configuration names: runs that differ
    in it are not runs of one kind either."""
    sources = str(OmegaConf.to_container(cfg.choices, resolve=False)).replace("hydra:runtime.choices.", "")
    named, beside = set(re.findall(r"[\w./]+", sources)), (*SURROUNDINGS, *FILES)
    overrides = dict(override.lstrip("+").partition("=")[::2] for override in HydraConfig.get().overrides.task)
    return {
        key: settings.get(key, value)
        for key, value in overrides.items()
        if (key not in named and key.split(".")[0] not in beside) or _is_users_experiment(key, value)
    }


def _is_users_experiment(key: str, value: str) -> bool:
    """Whether an override names a set of settings that is in no file of ours: what it sets has no other name."""
    files = [CONF / key / f"{each.strip()}.yaml" for each in value.strip("[]").split(",")]
    return key == "experiment" and not all(file.is_file() for file in files)


def check(config: Mapping[str, Any], schema: Callable, *, also: Collection[str] = ()) -> None:
    """Bind the root to `schema`, keys that are `also` there, where any are, to `surroundings`, and every `_target_`
    to its signature, without calling anything.

    Raises one UserError that lists every unknown, missing or misspelt key, every target that cannot be imported,
    and every value that is out of its range or not of its type.
    """
    method = {key: value for key, value in config.items() if key not in also}
    beside = {key: value for key, value in config.items() if key in also}
    problems = [*bound("", method, schema), *(bound("", beside, surroundings) if also else ())]
    if isinstance(limits := beside.get("budget"), Mapping):
        problems += bound("budget", limits, budget)
    for number, student in enumerate((config.get("merging") or {}).get("students", ())):
        if isinstance(student, Mapping):
            problems += bound(f"merging.students[{number}]", student, schema)
    problems += [problem for key, node in _once(config).items() for problem in _walk(key, node)]
    raise_for(problems)


def _once(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without what stands there twice: the choices, and `wandb` again among the loggers."""
    once = {key: node for key, node in config.items() if key != "choices"}
    if isinstance(loggers := once.get("logger"), Mapping):
        once["logger"] = {name: node for name, node in loggers.items() if node != once.get("wandb")}
    return once


def raise_for(problems: Sequence[str]) -> None:
    """Raises one UserError that lists these mistakes, if there are any."""
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"The configuration has {len(problems)} mistake(s); nothing was run.\n{listed}")


def _walk(where: str, node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for number, item in enumerate(node):
            yield from _walk(f"{where}[{number}]", item)
    if not isinstance(node, Mapping):
        return
    if odd := [key for key in node if not isinstance(key, str)]:
        yield f"{where} has {', '.join(map(repr, odd))} for a name: put names that are no words in quotes."
        return
    if "_target_" in node:
        target = _imported(node["_target_"])
        if target is None:
            named = node["_target_"]
            yield f"{where}._target_: {named!r} cannot be imported and called.{_near_target(named)}"
            return
        yield from _wrong_node(where, node, target)
    for key, value in node.items():
        yield from _walk(f"{where}.{key}", value)


def _imported(named: Any) -> Callable | None:
    try:
        target = get_object(named)
    except Exception:  # whatever the import of a user's module raises, there is nothing to call
        return None
    return target if callable(target) else None


def _wrong_node(where: str, node: Mapping[str, Any], target: Callable) -> Iterator[str]:
    """What is wrong with a node as a call of its target."""
    named = node["_target_"]
    if hidden := sorted(key for key in node if key.startswith("_") and key not in ("_target_", "_partial_")):
        yield f"{where}: {', '.join(hidden)} is not for users. Beside _target_ there is _partial_ alone."
    if (parameters := _parameters(target)) is None:
        yield f"{where}._target_: {named} does not say what it takes. Name a function or class of Python's own."
        return
    arguments = {key: node[key] for key in node if not key.startswith("_")}
    waits = _waits(target, parameters)
    if waits and node.get("_partial_", False) is not True:
        yield f"{where}._partial_ must be true: {named} is called later, with what the code gives it."
    if not waits and node.get("_partial_", False) and not _may_wait(target, parameters, arguments):
        yield f"{where}._partial_ must not be set: {named} waits for nothing. Take it out."
    yield from bound(where, arguments, target)


def _parameters(target: Callable) -> list[inspect.Parameter] | None:
    """What a target takes; None for what does not say so (some that are written in C)."""
    try:
        return list(inspect.signature(target).parameters.values())
    except (ValueError, TypeError):
        return None


def _waits(target: Callable, parameters: Sequence[inspect.Parameter]) -> bool:
    """Whether a function needs what the code gives it, and not settings alone."""
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return not inspect.isclass(target) and any(p.default is p.empty for p in positional)


def _may_wait(target: Callable, parameters: Sequence[inspect.Parameter], arguments: Collection[str]) -> bool:
    """Whether anything is left that the code could give it."""
    if inspect.isclass(target):
        return any(p.default is p.empty and p.name not in arguments for p in parameters)
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


def bound(where: str, arguments: Mapping[str, Any], target: Callable) -> Iterator[str]:
    """What is wrong with `arguments` as the keyword arguments of `target`."""
    parameters = _parameters(target) or []
    # A function's positional parameters are passed by code; a record's fields may all be set.
    settable = [p for p in parameters if p.kind is p.KEYWORD_ONLY or inspect.isclass(target)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    names = [p.name for p in settable]
    prefix = f"{where}." if where else ""
    for key in arguments:
        if key not in names:
            yield f"{prefix}{key} is not a setting.{near(str(key), names, prefix)} Known here: {', '.join(names)}."
    for parameter in settable:
        name, place = parameter.name, f"{prefix}{parameter.name}"
        if name not in arguments:
            if parameter.default is parameter.empty:
                yield f"{place} has no value."
        elif is_ours(target):
            value, annotation = arguments[name], annotation_of(parameter, target)
            yield from [*wrong_value(place, annotation, value)] or _uncallable(place, value, _called(annotation))


def _called(annotation: Any) -> int | None:
    """With how many values what stands here is called; None where its annotation does not say."""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return next((part.values for part in parts if isinstance(part, Called) and part.values), None)
    listed = get_origin(annotation) is collections.abc.Callable and isinstance(parts[0], list)
    return len(parts[0]) if listed else None


def _uncallable(where: str, node: Any, values: int | None) -> Iterator[str]:
    """Whether what a node makes cannot be called with so many values."""
    if values is None or not isinstance(node, Mapping) or (target := _imported(node.get("_target_"))) is None:
        return
    settings = {key: None for key in node if not key.startswith("_")}
    called: Any = target
    arguments: list[None] = [None] * values
    if inspect.isclass(target):
        called = next((vars(each)["__call__"] for each in target.__mro__ if "__call__" in vars(each)), None)
        settings, arguments = {}, [None, *arguments]  # itself
    try:
        inspect.signature(called).bind(*arguments, **settings)
    except TypeError as error:
        named = node["_target_"]
        yield f"{where}._target_: {named} is called with {values} values, which it does not take ({error})."


def _near_target(target: Any) -> str:
    """Names in the same module that look like the one that was asked for."""
    module, _, name = str(target).rpartition(".")
    try:
        near = difflib.get_close_matches(name, dir(get_object(module)), n=3)
    except Exception:  # whatever the import of a user's module raises, the target stays unknown
        return " Is its folder on PYTHONPATH (or in the one given by --config-dir)?"
    return f" Near names in {module}: {', '.join(near)}." if near else ""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names, as W&B and tables show them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def writable_folder(path: Path, setting: str) -> Path:
    """Create the folder; raises UserError, before any work, where it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}). Give another folder with {setting}=..."
        ) from None
    return path
