"""What Hydra makes of the files of `conf/` under the same choices of groups, made once in a process of tests.
Settings beside the choices are put in by Hydra each time; so is all of it where other files are searched too."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins

from sddx.config import CONF

MAPPED = defaults_list._create_interpolation_map
LISTED, MERGED = config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list
Plugins.instance()  # which loads the module of this class once more
FileConfigSource: Any = SourcesRegistry.instance().resolve("file")
READ = FileConfigSource.load_config
_found: dict[Any, bytes] = {}


def once(key: Any, make: Callable[[], Any]) -> Any:
    """A copy of what was made for this key; what raises is made again."""
    if key not in _found:
        _found[key] = pickle.dumps(make())
    return pickle.loads(_found[key])


def ours(repo: Any) -> bool:
    """Whether nothing is searched but what no test writes."""
    return {source.path for source in repo.get_sources() if source.scheme() == "file"} == {str(CONF)}


@wraps(LISTED)
def listed(repo: Any, config_name: str | None, overrides_list: list[Any], **how: bool) -> Any:
    """The list of defaults, which hangs on the choices of groups alone; told from settings as Hydra tells them."""
    if not ours(repo):
        return LISTED(repo=repo, config_name=config_name, overrides_list=overrides_list, **how)
    plain = [given for given in overrides_list if not given.is_sweep_override()]
    settings = [g for g in plain if isinstance(g.value(), dict) or not repo.group_exists(g.key_or_group)]
    choices = [given for given in plain if given not in settings]
    key = (config_name, *(given.input_line for given in choices), *how.items())
    found = once(key, lambda: LISTED(repo=repo, config_name=config_name, overrides_list=choices, **how))
    return replace(found, config_overrides=settings)


@wraps(MERGED)
def merged(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> Any:
    """The files of such a list, merged."""
    if not ours(repo):
        return MERGED(self, defaults=defaults, repo=repo)
    return once(repr(defaults), lambda: MERGED(self, defaults=defaults, repo=repo))


@wraps(READ)
def read(self: Any, config_path: str) -> Any:
    """One file of `conf/`."""
    if self.path != str(CONF):
        return READ(self, config_path)
    return once((self.provider, config_path), lambda: READ(self, config_path))


@wraps(MAPPED)
def mapped(overrides: Any, defaults_list: list[Any], self_added: bool) -> Any:
    """What a file's list of defaults is interpolated with, where anything in it is."""
    asked = any(each.is_interpolation() for each in defaults_list)
    return MAPPED(overrides, defaults_list, self_added) if asked else None


def remember() -> None:
    """From here on, in this process."""
    defaults_list._create_interpolation_map = mapped
    config_loader_impl.create_defaults_list = listed
    ConfigLoaderImpl._compose_config_from_defaults_list = merged
    FileConfigSource.load_config = read
