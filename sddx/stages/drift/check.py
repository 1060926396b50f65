"""What measuring drift refuses before any work."""

from __future__ import annotations

from typing import Any

from sddx.config.build import Settings, made
from sddx.errors import UserError
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
    asked, held_out = _drift(method), method["validation"]
    if held_out < asked.size:
        raise UserError(
            f"drift.size={asked.size} rows are held-out ones, and validation={held_out} holds out fewer. Use "
            f"validation={asked.size}, or a smaller drift.size."
        )
    check = (method["dataset"].get("check") or {}).get("_target_", "")
    if asked.samples and check.rpartition(".")[2] in ("", "none", "open_answer"):
        raise UserError(
            f"drift.samples={asked.samples} answers are right or wrong by dataset.check, and that of this data set "
            f"({check or 'null'}) does not tell. Use drift.samples=0, or another data set."
        )
    if method["trainer"].get("strategy") == "fsdp":
        raise UserError(
            "Drift is measured on one device that holds the model whole, which trainer.strategy=fsdp says that "
            "none does. Leave out +drift, or use another strategy."
        )


def _check_room(method: Settings, model: LocalModel) -> None:
    from sddx.data.check import examples_here
    from sddx.data.encode import render, token_ids
    from sddx.models.load import context_of

    asked, context = _drift(method), context_of(model.config)
    held_out, _ = examples_here(method["dataset"], method["validation"])
    prompts = token_ids(model.tokenizer, [render(model.tokenizer, row.prompt) for row in held_out[: asked.size]])
    if prompts and context and min(map(len, prompts)) + asked.max_new_tokens > context:
        raise UserError(
            f"No held-out prompt leaves room for {asked.max_new_tokens} tokens in the model's context of "
            f"{context}. Lower drift.max_new_tokens."
        )
