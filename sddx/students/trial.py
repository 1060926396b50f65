"""A cut tried out on a narrow model of the same family: what is proven of a pruned model, before one is there."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sddx.compression.choose import Pruning
from sddx.compression.compressed import compress
from sddx.compression.remove import Removal
from sddx.compression.soundness import UnsoundModel, prove, sliced_logits
from sddx.config.build import tried
from sddx.errors import UserError
from sddx.models.anatomy import DECODER
from sddx.models.load import load_model, require_capped, said
from sddx.models.narrow import VOCABULARY, built, refusals, smallest
from sddx.models.outputs import require_own_head
from sddx.records import Cut
from sddx.students.student import saved_and_loaded

_mistakes: dict[tuple[str, Cut, str], str] = {}


def try_out(config: Any, cut: Cut, attention: str) -> bool:
    """Whether a narrow model of this config can be made, and runs. If so it was saved, loaded, cut, saved and
    loaded again, and proven, as the model itself will be; on the CPU in float32, and so, for an attention that may
    not run there (flash), by plain products. Raises UserError where it failed: in its head, or in what the cut
    leaves."""
    attention = _on_cpu(attention)
    asked = config.to_json_string(use_diff=False), cut, attention
    if asked not in _mistakes:
        try:
            model = small_model(config, attention)
        except UserError:
            return False
        _mistakes[asked] = _mistake(model, cut, attention)
    if wrong := _mistakes[asked]:
        raise UnsoundModel(f"A narrow {config.model_type} model with random weights was tried: {wrong}")
    return True


def small_model(config: Any, attention: str) -> Any:
    """A narrow model of this config with random weights, in eval mode. Raises UserError where none can be made,
    none that runs, or none that attends as it should."""
    attention = _on_cpu(attention)
    require_capped(config, attention)
    model = built(smallest(config), torch.float32, attn_implementation=attention)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for weight in model.parameters():  # at first many are 0 or 1, and one stands for another
            weight.add_(0.05 * torch.randn_like(weight))
        try:
            model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long))
        except refusals() as error:
            raise UserError(f"a narrow {config.model_type} model does not run: {said(error)}.") from error
    return model


def _on_cpu(attention: str) -> str:
    """What stands there for an attention that may not run in float32 on a CPU."""
    return attention if attention in ("sdpa", "eager") else "eager"


def _mistake(model: nn.Module, cut: Cut, attention: str) -> str:
    """What is wrong with such a model or what the cut leaves of it; nothing where all is well."""
    try:
        _prove(model, cut, attention)
    except UserError as error:
        return str(error)
    except refusals() as error:
        return f"{said(error)}."
    return ""


def _prove(made: Any, cut: Cut, attention: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made.save_pretrained(folder)
        model = load_model(folder, attention=attention)
        require_own_head(model)
        sliced = sliced_logits(model, cut, vocabulary=VOCABULARY)
        student = compress(model, [Removal(cut)])

        def again() -> Any:
            return saved_and_loaded(student, folder, base="", dtype="float32", attention=attention)

        whole = student.whole[DECODER]
        prove(model, vocabulary=VOCABULARY, again=again, sliced=sliced, whole=whole)


def require_rule(pruning: Pruning, count: int) -> None:
    """Raises UserError where the rule does not name `remove` of `count` units: tried without scores where there is
    no metric, else on one score a unit and on distances between all states."""
    tables: list[Any] = [None]
    if pruning.metric is not None:
        ascending = [float(number) for number in range(count + 1)]
        tables = [{"mean": ascending[:count]}, {"mean": [ascending for _ in range(count + 1)]}]
    refused = []
    for table in tables:
        try:
            named = tried("pruning.choose", pruning.choose, table, count, pruning.remove)
        except UserError as error:
            refused.append(error)
            continue
        wanted = (
            isinstance(named, Sequence) and set(named) <= set(range(count)) and len(set(named)) == pruning.remove
        )
        if not wanted:
            refused.append(
                UserError(f"pruning.choose gives {named!r}, and {pruning.remove} unit numbers are needed.")
            )
    if len(refused) == len(tables):
        raise refused[0]
