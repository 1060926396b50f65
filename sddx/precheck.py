"""What a whole configuration must satisfy beyond its keys, found out before any work starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sddx.build import build
from sddx.records import Units, UserError


def precheck(method: dict[str, Any]) -> None:
    """What would otherwise fail late: the evaluation tasks exist, the tokenizer has a chat template, at least
    one unit stays, metric and patch can be what they are asked to be, what writes answers is installed, another
    teacher fits the student. Raises one UserError with all that is wrong."""
    from sddx.evaluation.harness import check_tasks
    from sddx.models.load import load_tokenizer, locate, require_chat_template, text_config
    from sddx.training.objective import require_comparable

    folder, _ = locate(method["model"]["path"], revision=method["model"]["revision"])
    config = text_config(folder)
    checks: list[Callable[[], None]] = [
        lambda: check_tasks(method["evaluation"]["tasks"], method["evaluation"]["include"]),
        lambda: require_chat_template(load_tokenizer(folder), folder),
        lambda: _check_pruning(method, config),
    ]
    if method["loss"]["data"] != "reference":
        checks.append(lambda: getattr(build(method["generation"]), "require", lambda: None)())
    if method["teacher"]:
        checks.append(
            lambda: require_comparable(build(method["loss"]), config, text_config(locate(method["teacher"])[0]))
        )
    wrong: list[str] = []
    for each in checks:
        try:
            each()
        except UserError as error:
            wrong.extend(error.args)
    if wrong:
        raise UserError(*wrong)


def _check_pruning(method: dict[str, Any], config: Any) -> None:
    """At least one unit stays, and a patch can stand in for what goes. Raises UserError."""
    from sddx.surgery.choose import require_removable
    from sddx.surgery.junction import require_patch
    from sddx.training.objective import require_junction

    pruning = build(method["pruning"])
    units = Units(pruning.units, config.num_hidden_layers)
    require_removable(len(units), pruning.remove, "units" if units.granularity != "blocks" else "blocks")
    if pruning.patch.fit is not None and pruning.remove:
        require_patch(config.model_type, units, pruning.patch)
        moved = pruning.patch.fold or pruning.patch.fit.reads != "stream"  # the block before the junction changes
        require_junction(build(method["loss"]), retrained=moved)
