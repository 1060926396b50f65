"""What a whole configuration must satisfy beyond its keys, found out before any work starts: what each stage
checks."""

from __future__ import annotations

import pkgutil
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from sddx import stages
from sddx.config.build import Node
from sddx.errors import require_none, told
from sddx.stages.local_model import Check, LocalModel
from sddx.tracking import require as require_tracked


def precheck(method: Node, wandb: Node, *, download: bool, device: str = "auto", shaky: bool = False) -> None:
    """What would otherwise fail late; `wandb` is the tracker's node. Raises one UserError with all that is wrong
    with the settings alone and, where the model is on this machine, with what is to be done to it; a model is
    downloaded only where that is asked for and the settings are right. Whether there is such a `device` is asked
    where the run takes place. `shaky`: other mistakes are known, which checks may stumble over."""
    from sddx.models.load import is_here, locate, require_known, require_loadable

    path, revision = method["model"]["path"], method["model"]["revision"]
    device_known: list[Check] = [partial(require_known, device)]
    wrong = told([*device_known, *_of_settings(method), lambda: require_tracked(wandb)], shaky=shaky)
    if is_here(path, revision) or (download and not wrong):
        found: list[LocalModel] = []

        def find() -> None:
            folder, _ = locate(path, revision=revision)
            require_loadable(folder, method["model"]["attention"])
            found.append(LocalModel(folder, method["model"]["dtype"], method["model"]["attention"]))

        wrong += told([find], shaky=shaky)
        wrong += [mistake for model in found for mistake in told(_of_model(method, model), shaky=shaky)]
    require_none(wrong)


def _of_settings(method: Node) -> list[Check]:
    """What each stage refuses of the settings alone."""
    return [check for stage in _stages() for check in getattr(stage, "of_settings", _nothing)(method)]


def _of_model(method: Node, model: LocalModel) -> list[Check]:
    """What each stage refuses of the settings with this model."""
    return [check for stage in _stages() for check in getattr(stage, "of_model", _nothing)(method, model)]


def _nothing(*given: Any) -> list[Check]:
    return []


@cache
def _stages() -> list[ModuleType]:
    """The checks of all stages that have any: whoever adds a stage adds them in its folder."""
    names = [f"{stages.__name__}.{each.name}.check" for each in pkgutil.iter_modules(stages.__path__) if each.ispkg]
    return [import_module(name) for name in names if find_spec(name)]
