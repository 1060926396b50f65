"""What measuring drift refuses before any work."""

from __future__ import annotations

from typing import Any

from sddx.config.build import Settings, made
from sddx.errors import UserError
from sddx.stages.held_out import prompts_here, require_held_out, require_whole
from sddx.stages.local_model import Check, LocalModel


def of_settings(method: Settings) -> list[Check]:
    """There are held-out rows, and a device holds the model whole."""
    from sddx.data.check import require_rows

    if not method.get("drift"):
        return []
    rows: list[Check] = [lambda: require_rows(method["dataset"], method["validation"])]
    return [lambda: _check(method), *([] if method["loss"]["terms"] else rows)]


def of_model(method: Settings, model: LocalModel) -> list[Check]:
    """Rows can be put into the model's form, and one of their prompts leaves room for an answer."""
    return [lambda: model.ending, lambda: _check_room(method, model)] if method.get("drift") else []


def _drift(method: Settings) -> Any:
    from sddx.drift.measure import Drift

    return made(method["drift"], Drift, "drift")


def _check(method: Settings) -> None:
    asked = _drift(method)
    require_held_out("drift", asked.size, method["validation"], "rows are held-out ones")
    check = (method["dataset"].get("check") or {}).get("_target_", "")
    if asked.samples and check.rpartition(".")[2] in ("", "none", "open_answer"):
        raise UserError(
            f"drift.samples={asked.samples} answers are right or wrong by dataset.check, and that of this data set "
            f"({check or 'null'}) does not tell. Use drift.samples=0, or another data set."
        )
    require_whole("drift", method, "Drift is measured")


def _check_room(method: Settings, model: LocalModel) -> None:
    from sddx.data.encode import fitting
    from sddx.models.load import context_of

    asked = _drift(method)
    if prompts := prompts_here(method["dataset"], method, model, asked.size):
        fitting(context_of(model.config), prompts, asked.max_new_tokens, "drift.max_new_tokens")
