"""Cuts that keep a pattern of blocks: every sixth attends to all, say, and the others to a window."""

from __future__ import annotations

from typing import Any

from sddx.errors import UserError
from sddx.records import Cut


def period(config: Any) -> int | None:
    """After how many blocks their kinds (`layer_types` of a config) repeat; None where they are not told, or do
    not repeat at all."""
    kinds = list(getattr(config, "layer_types", None) or ())
    return next((n for n in range(1, len(kinds)) if kinds[n:] == kinds[:-n]), None)


def require_whole_periods(config: Any, remove: int) -> None:
    """Raises UserError where no run of so many blocks can be taken out without moving the kinds of those behind."""
    if (every := period(config)) is None:
        raise UserError(
            f"pruning.keep_pattern=true, and the blocks of this {config.model_type} model have no kinds that "
            "repeat. Leave it out."
        )
    if remove % every:
        raise UserError(
            f"pruning.keep_pattern=true and pruning.remove={remove}: the kinds of blocks repeat after {every}, and "
            f"only multiples of that leave the others in their places. Give pruning.remove="
            f"{max(remove // every, 1) * every}."
        )


def require_kept(config: Any, cut: Cut) -> None:
    """Raises UserError where the blocks that a cut keeps are not of the kinds that a model of that depth has."""
    kinds = list(config.layer_types)
    if [kinds[block] for block in cut.kept] != kinds[: len(cut.kept)]:
        raise UserError(
            f"pruning.keep_pattern=true, and without blocks {list(cut.removed)} the kinds of blocks no longer "
            "repeat as they did. Choose a contiguous cut, such as pruning=angular, or leave keep_pattern out."
        )
