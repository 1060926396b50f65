"""What stages that try a model on held-out rows refuse alike, whatever they try."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sddx.config.build import Settings
from sddx.errors import UserError
from sddx.stages.inputs import task_parts
from sddx.stages.local_model import LocalModel

SOURCE = ("name", "subset", "split")  # of a data set of the hub, what its rows are
UNORDERED = ("size", "check", "rewrite", "trains")  # and settings by which no other row is held out


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


def require_other_items(
    where: str,
    tasks: Collection[str],
    split: Settings | None,
    evaluation: Settings,
    *,
    side: str | None = "selection",
    include: str | None = None,
) -> None:
    """Raises UserError where the run reports on items of tasks by which something is chosen at `where`: those of
    one split of their data, unless the sides differ. An evaluation of selection items reports nothing."""
    reported = evaluation.get("side")
    if reported == "selection" or (reported == "report" and side == "selection"):
        return
    chosen = {"split": split, "include": include}
    named = [task for task in evaluation["tasks"] if task in tasks and not task.endswith("_selection")]
    if both := [task for task in named if _of_one_split(task, chosen, evaluation)]:
        raise UserError(
            f"{where}.side={side or 'null'} chooses by items of {', '.join(both)} on which evaluation.side="
            f"{reported or 'null'} reports too. Use {where}.side=selection with evaluation.side=report, or name "
            f"another split in {where}.split."
        )


def _of_one_split(task: str, *evaluations: Settings) -> bool:
    """Whether two evaluations take a task's items from one split of its data: the one that they name, or else the
    task's own."""
    one, other = ((each.get("split") or {}).get(task) for each in evaluations)
    if one == other or None not in (one, other):
        return one == other
    parts = task_parts([task], evaluations[0 if one is None else 1].get("include"))
    own = [part.get("test_split") or part.get("validation_split") or "test" for part in parts]  # lm-eval's rule
    return (one or other) in own


def require_unseen(who: str, student: Settings, where: str, dataset: Settings, validation: int) -> None:
    """Raises UserError where `who`, the run of a `student`'s settings, trains on prompts that are held out of a
    data set for what `where` asks for: by the prompts of both, or where the hub has the rows of both, by the
    settings that say which are held out."""
    if _trains_on(student, dataset, validation):
        raise UserError(
            f"{who} trains on prompts that are held out for {where}. Let both hold out the same rows of a data set "
            "(dataset.seed, validation), or measure on other ones."
        )


def _trains_on(student: Settings, dataset: Settings, validation: int) -> bool:
    from sddx.data.check import examples_here
    from sddx.data.sources import of_hub
    from sddx.data.split import canonical

    own = student["dataset"]
    if of_hub(own) and of_hub(dataset):
        one, other = ({k: v for k, v in node.items() if k not in UNORDERED} for node in (own, dataset))
        held_out_alike = (one, student["validation"]) == (other, validation)
        return all(one.get(name) == other.get(name) for name in SOURCE) and not held_out_alike
    held_out, training = examples_here(dataset, validation)[0], examples_here(own, student["validation"])[1]
    prompts = {canonical(each.prompt) for each in held_out}
    return any(canonical(each.prompt) in prompts for each in training)


def prompts_here(dataset: Mapping[str, Any], method: Settings, model: LocalModel, size: int) -> list[list[int]]:
    """The tokens of the first held-out prompts of a data set, as far as its rows are on this machine."""
    from sddx.data.check import examples_here
    from sddx.data.encode import prompts_of

    held_out, _ = examples_here(dataset, method["validation"])
    return prompts_of(model.tokenizer, held_out[:size])
