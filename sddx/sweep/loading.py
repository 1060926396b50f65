"""Hydra's configuration of each cell of a grid, composed once for all that differ in values alone."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import cached_property
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

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """The configuration of one cell. Raises UserError for what Hydra refuses."""
        with composing():
            return self._loaded(self._parser.parse_overrides(list(overrides)))

    def _loaded(self, parsed: list[Override]) -> DictConfig:
        values = [each for each in parsed if self._is_value(each)]
        options = [each for each in parsed if self._is_option(each)]
        if len(values) + len(options) < len(parsed):
            return self._load(parsed)  # what is added or taken out: its order among the values may matter
        chosen = tuple(str(each.input_line) for each in options)
        if chosen not in self._composed:
            self._composed[chosen] = pickle.dumps(self._load(options))
        config: DictConfig = pickle.loads(self._composed[chosen])
        try:
            for each in values:
                OmegaConf.update(config, each.key_or_group, each.value())
        except OmegaConfBaseException:
            return self._load(parsed)  # which says what is wrong
        return self._told(config, parsed)

    def _load(self, parsed: Sequence[Override]) -> DictConfig:
        return self._hydra.load_sweep_config(self._config, [str(each.input_line) for each in parsed])

    @cached_property
    def _groups(self) -> Any:
        """Where Hydra looks for groups, with the places that the sweep's own overrides name."""
        of_hydra = list(self._config.hydra.overrides.hydra)
        name = self._config.hydra.job.config_name
        return self._hydra._parse_overrides_and_create_caching_repo(name, of_hydra)[1]

    def _is_value(self, override: Override) -> bool:
        """Whether an override changes a value of a run and nothing else."""
        changes = override.type is OverrideType.CHANGE and override.package is None
        key = override.key_or_group
        return changes and not override.is_hydra_override() and not self._groups.group_exists(key)

    def _is_option(self, override: Override) -> bool:
        """Whether an override chooses for a group, before any value is set, or is Hydra's own."""
        of_group = self._groups.group_exists(override.key_or_group) and not isinstance(override.value(), dict)
        return of_group or override.is_hydra_override()

    def _told(self, config: DictConfig, parsed: Sequence[Override]) -> DictConfig:
        """With what Hydra notes of a cell's overrides, and with what the sweep resolved once for all of them."""
        own = [each for each in parsed if not each.is_hydra_override()]
        config.hydra.overrides.task = [each.input_line for each in own]
        how = config.hydra.job.config.override_dirname
        name = get_overrides_dirname(own, kv_sep=how.kv_sep, item_sep=how.item_sep, exclude_keys=how.exclude_keys)
        config.hydra.job.override_dirname = name
        OmegaConf.copy_cache(from_config=self._config, to_config=config)
        return config
