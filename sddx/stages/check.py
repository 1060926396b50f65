"""What a whole configuration must satisfy beyond its keys, found out before any work starts: what each stage
checks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import ModuleType
from typing import Any

from sddx.config.build import Settings, with_defaults
from sddx.config.shared import once, once_as_read
from sddx.errors import mistakes_of, require_none
from sddx.stages.folders import modules
from sddx.stages.local_model import Check, LocalModel
from sddx.tracking import require as require_tracked

Listed = Callable[..., list[Check]]


def check_surroundings(loggers: Mapping[str, Settings], device: str) -> None:
    """Raises one UserError with what is wrong with the nodes of the group `logger`, and with a device that nobody
    knows; whether there is such a `device` is asked where the run takes place."""
    from sddx.models.load import require_known

    require_none(mistakes_of([partial(require_known, device), partial(require_tracked, loggers)]))


def precheck(method: Settings, *, download: bool, stages: Collection[str] | None = None) -> None:
    """What would otherwise fail late. Raises one UserError with all that is wrong with the settings alone and,
    where the model is on this machine, with what is to be done to it; a model is downloaded only where that is
    asked for and the settings are right. Where only some `stages` are to run, these alone are asked."""
    from sddx.models.load import is_here

    method = with_defaults(method)
    model, everyone = method["model"], [method, *merged_in(method)]
    asking = {name: each for name, each in modules("check").items() if stages is None or name in stages}
    wrong = [mistake for each in everyone for mistake in _refused(asking, "of_settings", each)]
    if is_here(model["path"], model["revision"]) or (download and not wrong):
        models: list[LocalModel] = []
        wrong += mistakes_of([lambda: models.append(_local(model))])
        asked = [(each, local) for local in models for each in everyone]
        wrong += [mistake for each, local in asked for mistake in _refused(asking, "of_model", each, local)]
    require_none(wrong)


def merged_in(method: Settings) -> list[Settings]:
    """The settings of the runs whose students are merged; none of finished ones."""
    return [each for each in (method.get("merging") or {}).get("students", []) if isinstance(each, Mapping)]


def _local(node: Settings) -> LocalModel:
    """The model of a `model` node, which is downloaded where it is not here. Raises UserError for one that cannot
    be loaded."""
    from sddx.models.load import locate, require_loadable

    def find() -> LocalModel:
        folder, _ = locate(node["path"], revision=node["revision"])
        require_loadable(folder, node["attention"])
        return LocalModel(folder, node["dtype"], node["attention"])

    return once(["local model", *(node[name] for name in ("path", "revision", "dtype", "attention"))], find)


def _refused(asking: Mapping[str, ModuleType], kind: str, method: Settings, *model: LocalModel) -> list[str]:
    """What these stages refuse of the settings alone (`of_settings`), or with this model (`of_model`). Of the cells
    of a grid, a check is asked once of those that are alike in what it looks at."""
    wrong: list[str] = []
    for name, stage in asking.items():
        listed: Listed = getattr(stage, kind, _nothing)
        for number in range(len(listed(method, *model))):
            about = [name, kind, number, *model]
            wrong += once_as_read(about, method, partial(_asked, listed, number, *model))
    return wrong


def _asked(listed: Listed, number: int, *arguments: Any) -> list[str]:
    """What one of a stage's checks finds wrong; the settings come last."""
    *model, method = arguments
    return mistakes_of([listed(method, *model)[number]])


def _nothing(*arguments: Any) -> list[Check]:
    return []
