"""What a search for the shares of a merge refuses before any work."""

from __future__ import annotations

from typing import Any

from sddx.config.build import Settings, build
from sddx.errors import UserError
from sddx.stages.evaluate import check as evaluate
from sddx.stages.held_out import require_other_items
from sddx.stages.local_model import Check, LocalModel


def of_settings(method: Settings) -> list[Check]:
    """There are two students, a method with shares, and tasks of selection items that can be evaluated."""
    if not (search := _search(method)):
        return []
    return [
        lambda: _check(method["merging"], search),
        lambda: _require_for_choosing(search["evaluation"], method["evaluation"]),
        *evaluate.of_settings(_choosing(method, search)),
    ]


def of_model(method: Settings, model: LocalModel) -> list[Check]:
    """What is asked fits the model, as in the evaluation of a run."""
    return evaluate.of_model(_choosing(method, search), model) if (search := _search(method)) else []


def _search(method: Settings) -> Any:
    return (method.get("merging") or {}).get("search")


def _choosing(method: Settings, search: Settings) -> Settings:
    """The settings with the evaluation that candidates are judged by."""
    return {**method, "evaluation": search["evaluation"]}


def _check(merging: Settings, search: Settings) -> None:
    from sddx.merging.search import plain_shares

    if (count := len(merging["students"])) != 2:
        raise UserError(f"merging.search goes between two students, and there are {count}. Give two.")
    start = merging["method"].get("t")
    plain_shares(merging["method"], len(start) if isinstance(start, list) else 1)
    build(search["by"])


def _require_for_choosing(evaluation: Settings, reported: Settings) -> None:
    """Candidates are judged in this process, by items that the run does not report on. Raises UserError."""
    split = evaluation.get("split") or {}
    if evaluation.get("backend", "hf") != "hf":
        raise UserError(
            "merging.search judges candidates in this process. Use merging.search.evaluation.backend=hf."
        )
    named = [each for each in evaluation["tasks"] if each in split or each.endswith("_selection")]
    for_report = [each for each in evaluation["tasks"] if each not in named]
    if evaluation.get("side") != "selection" and for_report:
        raise UserError(
            f"merging.search.evaluation: the items of {', '.join(for_report)} are for the report, and nothing is "
            "chosen by them. Name an evaluation of selection items: evaluation@merging.search.evaluation=..., one "
            "of tiny_selection, small_selection, selection."
        )
    asked = {name: evaluation.get(name) for name in ("side", "include")}
    require_other_items("merging.search.evaluation", evaluation["tasks"], split, reported, **asked)
