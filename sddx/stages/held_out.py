"""What stages that try a model on held-out rows refuse alike, whatever they try."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sddx.config.build import Settings
from sddx.errors import UserError
from sddx.stages.local_model import LocalModel


def require_held_out(group: str, size: int, held_out: int, of: str) -> None:
    """Raises UserError where `size` of a group of settings asks for more rows than are held out; `of` says what are
    counted."""
    if held_out < size:
        raise UserError(
            f"{group}.size={size} {of}, and validation={held_out} holds out fewer. Use validation={size}, or a "
            f"smaller {group}.size."
        )


def require_whole(group: str, method: Settings, what: str) -> None:
    """Raises UserError where no device holds the model whole, on which `what` is done."""
    if method["trainer"].get("strategy") == "fsdp":
        raise UserError(
            f"{what} on one device that holds the model whole, which trainer.strategy=fsdp says that none does. "
            f"Leave out +{group}, or use another strategy."
        )


def require_other_items(where: str, tasks: Collection[str], split: Settings | None, evaluation: Settings) -> None:
    """Raises UserError where the run reports on the selection items of tasks by which something is chosen at
    `where`."""
    if evaluation.get("side") is not None:
        return
    splits = [(split or {}), (evaluation.get("split") or {})]
    both = [task for task in evaluation["tasks"] if task in tasks and splits[0].get(task) == splits[1].get(task)]
    if both:
        raise UserError(
            f"{where}.side=selection chooses by items of {', '.join(both)} on which evaluation.side=null reports "
            "too. Use evaluation.side=report."
        )


def prompts_here(dataset: Mapping[str, Any], method: Settings, model: LocalModel, size: int) -> list[list[int]]:
    """The tokens of the first held-out prompts of a data set, as far as its rows are on this machine."""
    from sddx.data.check import examples_here
    from sddx.data.encode import prompts_of

    held_out, _ = examples_here(dataset, method["validation"])
    return prompts_of(model.tokenizer, held_out[:size])
