"""Other runs that a configuration names by what they differ in, composed as the command line composes them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from os.path import exists, expanduser
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf

from sddx.errors import UserError
from sddx.records import MERGING


def named(run: str | Sequence[str]) -> str:
    """What such a run is called in tables: its overrides, or the folder of a finished one."""
    return run if isinstance(run, str) else " ".join(run)


def parent(run: str | Sequence[str], job: str, own: Sequence[str]) -> dict[str, Any] | str:
    """The settings of the run that these overrides make of this one, as plain values; the path of a finished run as
    it stands. `job` is the configuration's name. Raises UserError where there is no such configuration."""
    if isinstance(run, str) and exists(expanduser(run)):
        return run
    asked = _overrides(run)
    shared = [
        each for each in HydraConfig.get().overrides.task if not is_of_merging(each.lstrip("+~").partition("=")[0])
    ]
    try:
        composed = compose(job, overrides=[*shared, *asked])
    except HydraException as error:
        raise UserError(
            f"merging.students: {named(run)!r} is no finished run's folder, nor does it make a run here: {error}"
        ) from None
    settings: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    return {name: settings[name] for name in own if name in settings} | {"choices": {}}


def _overrides(run: Any) -> list[str]:
    """What a run changes. Raises UserError for what is no text, nor a list of texts."""
    if isinstance(run, list) and run and all(isinstance(each, str) for each in run):
        return run
    try:
        if isinstance(run, str):
            return shlex.split(run)
    except ValueError as error:
        raise UserError(f"merging.students: {run!r} cannot be read as overrides: {error}.") from None
    raise UserError(
        f"merging.students names a run as {run!r}. Give what it changes here as a text, 'seed=1 dataset.size=64', "
        "or as a list of such, or the folder of a finished run."
    )


def is_of_merging(name: str) -> bool:
    """Whether a setting, or a group or the place where it is put, says what students become: merging.method.t,
    merging/search, evaluation@merging.search.evaluation. Students that are named do not share it."""
    return any(re.split("[./]", place)[0] == MERGING for place in name.split("@"))


def at_seed(student: str, seed: int) -> str:
    """What a student that was asked for by a run's seed, seed=1${seed}, is called at this one."""
    return student.replace("${seed}", str(seed))
