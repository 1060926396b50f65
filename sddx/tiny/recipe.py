"""The settings that make the embedded model, and what is wrong with them, told before half an hour of work."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sddx.config import check, writable_folder
from sddx.config.build import build
from sddx.errors import UserError, mistakes_of, require_none
from sddx.records import Positive, Seed, Share


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The `model` node: the dimensions of a Llama."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_theta: float
    initializer_range: float

    def mistakes(self) -> list[str]:
        """Why no model has these dimensions; empty where one has."""
        if wrong := [f"model.{name}={n} must be above 0." for name, n in asdict(self).items() if not _above_0(n)]:
            return wrong
        width, heads, groups = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if width % (2 * heads):
            wrong.append(f"model.hidden_size={width} is no even multiple of num_attention_heads={heads}.")
        if heads % groups:
            wrong.append(f"model.num_attention_heads={heads} is no multiple of num_key_value_heads={groups}.")
        return wrong


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of conf/pretrain.yaml, where it is said what each means."""

    out: str
    documents: int
    tokens_per_step: int
    matrix_learning_rate: float
    learning_rate: Positive
    warmup: Share
    decay: float
    prompt_weight: float
    precision: Literal["float32", "bfloat16"]
    threads: int
    seed: Seed
    model: Shape
    evaluation: dict[str, Any]

    def mistakes(self) -> list[str]:
        """Which numbers are out of their range; empty where all are within."""
        values, shares = asdict(self), ("warmup", "decay")
        rest = ("documents", "tokens_per_step", "matrix_learning_rate", "learning_rate", "threads")
        wrong = [
            f"{name}={values[name]} must be above 0." for name in (*rest, *shares) if not _above_0(values[name])
        ]
        wrong += [f"{name}={values[name]} is a share: 1 at most." for name in shares if values[name] > 1]
        if not 0 <= self.prompt_weight < math.inf:
            wrong.append(f"prompt_weight={self.prompt_weight} must be 0 or more.")
        if not 0 <= self.seed < 2**63:
            wrong.append(f"seed={self.seed} must be 0 or more, and below 2^63.")
        return wrong + self.model.mistakes()


def _above_0(number: float) -> bool:
    return 0 < number < math.inf


def recipe(config: dict[str, Any]) -> Recipe:
    """The recipe of a configuration as plain values. Raises UserError, with all that can be told, for settings that
    are unknown, of another type or out of their range, for tasks that cannot be evaluated, and for a folder that is
    there already or cannot be written."""
    require_none(mistakes_of([lambda: check(config, Recipe), lambda: _require_new(config.get("out"))]))
    made = Recipe(**config | {"model": build(config["model"])})
    require_none([*made.mistakes(), *mistakes_of([lambda: _require_tasks(made.evaluation)])])
    return made


def _require_new(out: Any) -> None:
    if not isinstance(out, str):
        return  # which is told with the other types
    folder = Path(out).resolve()
    if folder.exists():
        raise UserError(f"{folder} exists already. Name another folder with out=..., or remove it first.")
    writable_folder(folder.parent, "out")


def _require_tasks(evaluation: dict[str, Any]) -> None:
    from sddx.evaluation.task_data import require_task_data
    from sddx.evaluation.tasks import check_tasks

    tasks, include = evaluation["tasks"], evaluation["include"]
    names = ("limit", "shots", "primary", "chance", "split", "cluster")
    by_task: dict[str, Any] = {name: evaluation.get(name) for name in names}
    check_tasks(tasks, include, apart=evaluation.get("apart") or [], **by_task)
    require_task_data(tasks, include, evaluation.get("data_dir"))
