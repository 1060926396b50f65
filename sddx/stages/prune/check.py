"""What pruning and patching refuse before any work."""

from __future__ import annotations

from typing import Any

from sddx.config.build import Settings, build, made
from sddx.errors import UserError
from sddx.records import Units
from sddx.stages.local_model import Check, LocalModel


def of_model(method: Settings, model: LocalModel) -> list[Check]:
    """Something is left to train, the patch can be what it is asked to be, blocks can be taken out of a model of
    this kind, and it has one head."""
    from sddx.models.load import require_one_head

    checks: list[Check] = [
        lambda: _check_pruning(method, model.config),
        lambda: _check_family(method, model.config, model.attention),
    ]
    if model.config.tie_word_embeddings:
        checks.append(lambda: require_one_head(model.folder, model.bare()))
    return checks


def _check_pruning(method: Settings, config: Any) -> None:
    """At least one unit stays where it is to learn, and a patch can stand in for what goes. Raises UserError."""
    from sddx.compression.choose import Pruning, require_removable
    from sddx.compression.junction import require_patch
    from sddx.compression.pattern import require_whole_periods
    from sddx.students.trial import require_rule
    from sddx.training.objective import require_junction

    pruning = made(method["pruning"], Pruning, "pruning")
    units = Units(pruning.units, config.num_hidden_layers)
    require_removable(len(units), pruning.remove, "units" if units.granularity != "blocks" else "blocks")
    if pruning.remove == len(units) and method["loss"]["terms"]:
        raise UserError(
            f"pruning.remove={pruning.remove} leaves nothing that could learn. Remove less, or loss=none."
        )
    require_rule(pruning, len(units))
    if pruning.keep_pattern:
        require_whole_periods(config, pruning.remove)
    if pruning.patch.fit is None and pruning.patch.trained:
        raise UserError("pruning.patch.trained=true, and there is no patch. Choose one: pruning/patch=linear.")
    if pruning.patch.fit is not None and pruning.remove:
        if not units.cut(range(pruning.remove)).kept:
            raise UserError(
                f"pruning.remove={pruning.remove} leaves no block beside which a patch could stand. Remove less, "
                "or use pruning/patch=none."
            )
        require_patch(config.model_type, units, pruning.patch)
        moved = pruning.patch.fold or pruning.patch.fit.reads != "stream"  # the block before the junction changes
        require_junction(build(method["loss"]), retrained=moved)


def _check_family(method: Settings, config: Any, attention: str) -> None:
    """Blocks can be taken out of a model of this kind: tried on a narrow one where no test has. Raises
    UserError."""
    from sddx.models.anatomy import FAMILIES
    from sddx.students.trial import try_out

    pruning, total = build(method["pruning"]), config.num_hidden_layers
    if config.model_type in FAMILIES or pruning.units != "blocks" or not 0 < pruning.remove < total:
        return
    first = 1 if pruning.remove < total - 1 else 0
    removed = range(first, first + pruning.remove)
    if pruning.metric is None:  # the cut hangs on no score
        removed = pruning.choose(None, total, pruning.remove)
    try_out(config, Units("blocks", total).cut(removed), attention)
