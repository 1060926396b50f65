"""Hydra's configuration of each cell of a grid, composed once for all that differ in values alone."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import cache
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sddx.config.entry import composing


class Loader:
    """What `load_sweep_config` gives for the overrides of a cell, in a tenth of its time where a cell before chose
    the same options of all groups: as Hydra does itself, values are set in what the options were composed to."""

    def __init__(self, hydra: Any, config: DictConfig) -> None:
        """`hydra` is Hydra's loader, `config` its configuration of the whole sweep."""
        self._hydra, self._config = hydra, config
        self._parser = OverridesParser.create()
        self._composed: dict[tuple[str, ...], bytes] = {}
        self._is_group = cache(self._asked)

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """The configuration of one cell. Raises UserError for what Hydra refuses."""
        with composing():
            return self._loaded(self._parser.parse_overrides(list(overrides)))

    def _loaded(self, parsed: list[Override]) -> DictConfig:
        values = [each for each in parsed if self._sets_a_value(each, parsed)]
        options = [str(each.input_line) for each in parsed if each not in values]
        if tuple(options) not in self._composed:
            self._composed[tuple(options)] = pickle.dumps(self._load(options))
        config: DictConfig = pickle.loads(self._composed[tuple(options)])
        try:
            for each in values:
                OmegaConf.update(config, each.key_or_group, each.value())
        except OmegaConfBaseException:
            return self._load([str(each.input_line) for each in parsed])  # which says what is wrong
        return self._told(config, parsed)

    def _load(self, overrides: Sequence[str]) -> DictConfig:
        return self._hydra.load_sweep_config(self._config, list(overrides))

    def _asked(self, key: str) -> bool:
        of_hydra = list(self._config.hydra.overrides.hydra)  # it may name further places of groups
        return bool(self._hydra.get_group_options(key, None, self._config.hydra.job.config_name, of_hydra))

    def _sets_a_value(self, override: Override, all_of: Sequence[Override]) -> bool:
        """Whether an override changes a value and nothing else: none of a group or of Hydra, and none whose order
        among the others can matter."""
        if override.type is not OverrideType.CHANGE or override.package is not None:
            return False
        key = override.key_or_group
        if key.split(".")[0] == "hydra" or self._is_group(key):
            return False
        others = [each.key_or_group for each in all_of if each is not override]
        nested = [name for name in others if f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.")]
        return all(map(self._is_group, nested))  # options are composed before any value is set

    def _told(self, config: DictConfig, parsed: Sequence[Override]) -> DictConfig:
        """With what Hydra notes of a cell's overrides, and with what the sweep resolved once for all of them."""
        own = [each for each in parsed if not each.is_hydra_override()]
        config.hydra.overrides.task = [each.input_line for each in own]
        how = config.hydra.job.config.override_dirname
        name = get_overrides_dirname(own, kv_sep=how.kv_sep, item_sep=how.item_sep, exclude_keys=how.exclude_keys)
        config.hydra.job.override_dirname = name
        OmegaConf.copy_cache(from_config=self._config, to_config=config)
        return config
