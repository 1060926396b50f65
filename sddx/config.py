"""The configuration: where it is found, and the check that lists every mistake before any work starts.

Every group is a call: `_target_` and its keyword arguments. The signature is the schema: keyword-only
parameters are what YAML sets, positional ones are what the code passes (`_partial_: true`).
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sddx.arguments import near
from sddx.build import build
from sddx.ranges import is_ours, out_of_range, wrong_type
from sddx.records import UserError

_PACKAGE = Path(__file__).parent
# An installed package carries conf/ (with sweeps/ as one of its groups) inside; a checkout has it beside it.
CONF = next(folder / "conf" for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "conf").is_dir())

FILES = ("experiment", "sweeps")  # sets of settings, which count as what they set


def surroundings(
    *,
    run: dict,
    store: str | None,
    accept: list,
    device: str,
    wandb: dict,
    dry_run: bool,
    stages: list | None,
    metrics: dict,
    rates: dict | None = None,
    rehearse: Any = None,
    gpu: str | None,
    probe: int | float | str | None,
    context: int,
    budget: dict,
) -> None:
    """Settings that change no number of a run, those of plans last; a signature and no more."""


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
        if "choices" in config:
            config["choices"] |= _other_choices(cfg, flatten(config))
        return build(config["rehearse"])(config) if config.get("rehearse") else config
    except OmegaConfBaseException as error:
        if isinstance(error, MissingMandatoryValue):
            missing = ", ".join(sorted(OmegaConf.missing_keys(cfg)))
            told = f"These settings have no value: {missing}. Give each as name=value on the command line."
        else:
            told = f"The settings do not go together: {str(error).splitlines()[0]}."
        raise UserError(told) from None


def _other_choices(cfg: DictConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was set on the command line and is not among the choices that the configuration names: runs that differ
    in it are not runs of one kind either."""
    sources = str(OmegaConf.to_container(cfg.choices, resolve=False)).replace("hydra:runtime.choices.", "")
    named, beside = set(re.findall(r"[\w./]+", sources)), (*SURROUNDINGS, *FILES)
    given = dict(override.lstrip("+").partition("=")[::2] for override in HydraConfig.get().overrides.task)
    return {
        key: settings.get(key, value)
        for key, value in given.items()
        if key not in named and key.split(".")[0] not in beside
    }


def check(config: Mapping[str, Any], schema: Callable, *, also: Collection[str] = ()) -> None:
    """Bind the root to `schema`, keys that are `also` there, where any are, to `surroundings`, and every `_target_`
    to its signature, without calling anything.

    Raises one UserError that lists every unknown, missing or misspelt key, every target that cannot be imported,
    and every value that is out of its range or not of its type.
    """
    method = {key: value for key, value in config.items() if key not in also}
    beside = {key: value for key, value in config.items() if key in also}
    problems = [*_bound("", method, schema), *(_bound("", beside, surroundings) if also else ())]
    problems += [found for key in config if key != "choices" for found in _walk(key, config[key])]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"The configuration has {len(problems)} mistake(s); nothing was run.\n{listed}")


def _walk(where: str, node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for number, item in enumerate(node):
            yield from _walk(f"{where}[{number}]", item)
    if not isinstance(node, Mapping):
        return
    if "_target_" in node:
        named = node["_target_"]
        try:
            target = get_object(named)
        except (InstantiationException, ImportError, ValueError, AttributeError):
            target = None
        if not callable(target):
            yield f"{where}._target_: {named!r} cannot be imported and called.{_near_target(str(named))}"
            return
        if node.get("_partial_", False) is not True and _waits(target):
            yield f"{where}._partial_ must be true: {named} is called later, with what the code gives it."
        yield from _bound(where, {key: node[key] for key in node if not key.startswith("_")}, target)
    else:
        yield from (wrong for key in node for wrong in out_of_range(f"{where}.{key}", key, node[key]))
    for key, value in node.items():
        yield from _walk(f"{where}.{key}", value)


def _waits(target: Callable) -> bool:
    """Whether a function needs what the code gives it, and not settings alone."""
    given = [p for p in inspect.signature(target).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return not inspect.isclass(target) and any(p.default is p.empty for p in given)


def _bound(where: str, given: Mapping[str, Any], target: Callable) -> Iterator[str]:
    """What is wrong with the keyword arguments `given` to `target`."""
    parameters = inspect.signature(target).parameters.values()
    # A function's positional parameters are passed by code; a record's fields may all be set.
    settable = [p for p in parameters if p.kind is p.KEYWORD_ONLY or inspect.isclass(target)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    names = [p.name for p in settable]
    prefix = f"{where}." if where else ""
    for key in given:
        if key not in names:
            yield f"{prefix}{key} is not a setting.{near(key, names, prefix)} Known here: {', '.join(names)}."
    for parameter in settable:
        name, place = parameter.name, f"{prefix}{parameter.name}"
        if name not in given:
            if parameter.default is parameter.empty:
                yield f"{place} has no value."
        elif is_ours(target):
            wrong = [*wrong_type(place, parameter, given[name])]
            yield from wrong or out_of_range(place, name, given[name], str(parameter.annotation))


def _near_target(target: str) -> str:
    """Names in the same module that look like the one that was asked for."""
    module, _, name = target.rpartition(".")
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
