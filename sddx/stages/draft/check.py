"""What drafting refuses before any work."""

from __future__ import annotations

from typing import Any

from sddx.config.build import Settings, made
from sddx.errors import UserError
from sddx.records import OWN_PROMPTS
from sddx.stages.held_out import prompts_here, require_held_out, require_unseen, require_whole
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
    size = _drafts(method).size
    if OWN_PROMPTS in method["speculation"]["datasets"]:
        raise UserError(
            f"speculation.datasets.{OWN_PROMPTS} is what the run's own prompts are called. Give the other "
            "data set a name of its own: +dataset@speculation.datasets.other=..."
        )
    require_held_out("speculation", size, method["validation"], "prompts are those of held-out rows")
    for name, node in method["speculation"]["datasets"].items() if method["loss"]["terms"] else ():
        require_unseen("This run", method, f"speculation.datasets.{name}", node, method["validation"])
    require_whole("speculation", method, "Drafts are tried")


def _check_routes(method: Settings, model: LocalModel) -> None:
    """Of prompts that are here, one leaves room in the context; a narrow model of this kind, whose windows are as
    long, can go back in a text of that length."""
    from sddx.data.encode import fitting
    from sddx.models.load import context_of
    from sddx.speculation.measure import ROOM, require_route
    from sddx.students.trial import small_model

    asked, longest = _drafts(method), 1
    for node in [method["dataset"], *method["speculation"]["datasets"].values()]:
        if prompts := prompts_here(node, method, model, asked.size):
            longest = max(longest, *map(len, fitting(context_of(model.config), prompts, asked.new, ROOM)))
    require_route(small_model(model.config, model.attention), longest + asked.max_new_tokens)
