"""From a configuration node to what it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from sddx.records import UserError


def build(node: Mapping[str, Any]) -> Any:
    """Call a node's `_target_` with its other keys, nested nodes first; `_partial_: true` gives a function
    that waits for its positional arguments. A UserError comes through as itself, not in Hydra's wrapping."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
