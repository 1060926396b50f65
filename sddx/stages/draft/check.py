"""What drafting refuses before any work."""

from __future__ import annotations

from typing import Any

from sddx.config.build import Settings, made
from sddx.errors import UserError
from sddx.stages.local_model import Check, LocalModel


def of_settings(method: Settings) -> list[Check]:
    """There are held-out rows with prompts to try drafts on, and a device holds the model whole."""
    from sddx.data.check import require_rows

    if not (asked := method.get("speculation")):
        return []
    nodes = [*([] if method["loss"]["terms"] else [method["dataset"]]), *asked["datasets"].values()]
    rows: list[Check] = [lambda node=node: require_rows(node, method["validation"]) for node in nodes]  # type: ignore
    return [lambda: _check(method), *rows]


def of_model(method: Settings, model: LocalModel) -> list[Check]:
    """Prompts can be put into the model's form and leave room, and it can go back in a text."""
    if not method.get("speculation"):
        return []
    return [lambda: model.ending, lambda: _check_routes(method, model)]


def _drafts(method: Settings) -> Any:
    from sddx.speculation.measure import Drafts

    return made({**method["speculation"], "datasets": {}}, Drafts, "speculation")


def _check(method: Settings) -> None:
    asked, held_out = _drafts(method), method["validation"]
    if held_out < asked.size:
        raise UserError(
            f"speculation.size={asked.size} prompts are those of held-out rows, and validation={held_out} holds "
            f"out fewer. Use validation={asked.size}, or a smaller speculation.size."
        )
    if method["trainer"].get("strategy") == "fsdp":
        raise UserError(
            "Drafts are tried on one device that holds the model whole, which trainer.strategy=fsdp says that none "
            "does. Leave out +speculation, or use another strategy."
        )


def _check_routes(method: Settings, model: LocalModel) -> None:
    """Of prompts that are here, one leaves room in the context; a narrow model of this kind, whose windows are as
    long, can go back in a text of that length."""
    from sddx.data.check import examples_here
    from sddx.data.encode import render, token_ids
    from sddx.models.load import context_of
    from sddx.speculation.measure import fitting, require_route
    from sddx.students.trial import small_model

    asked, longest = _drafts(method), 1
    for node in [method["dataset"], *method["speculation"]["datasets"].values()]:
        held_out, _ = examples_here(node, method["validation"])
        texts = [render(model.tokenizer, row.prompt) for row in held_out[: asked.size]]
        if prompts := token_ids(model.tokenizer, texts):
            longest = max(longest, *map(len, fitting(context_of(model.config), prompts, asked.new)))
    require_route(small_model(model.config, model.attention), longest + asked.max_new_tokens)
