"""What a grid will build and about how long it will take, before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from sddx.config.shared import once
from sddx.records import Artifact
from sddx.runtime import Runtime
from sddx.store import Inputs, Stage, Store, digest, manifest

RECENT = 20  # artifacts of a stage whose durations are looked at


@dataclass(frozen=True)
class Step:
    """One stage of one run: whether the store has it, how much work it is, in which unit (see `work`), and what its
    manifest says, or would say, of its recipe."""

    stage: str
    key: str
    present: bool
    work: tuple[str, float]
    recipe: dict[str, Any] = field(default_factory=dict)


class Plan(Store):
    """A store that is only looked into: `build` names the artifact that a stage would make and notes it in `steps`.
    The rows of a data set are prepared all the same: the keys of what follows depend on them."""

    def __init__(self, root: Path, accept: Collection[str] = ()) -> None:
        super().__init__(root, accept)
        self.steps: list[Step] = []

    def build(self, stage: Stage, inputs: Inputs, /, *, runtime: Runtime, **spec: Any) -> Artifact:
        """The artifact that the stage would make, present or not; `prepare` alone is built."""
        if stage.__name__ == "prepare":
            return super().build(stage, inputs, runtime=runtime, **spec)
        recipe = digest.recipe(stage, inputs, spec)
        artifact, present = self._find(recipe)
        amount = work(stage.__name__, [made.stage for _, made in recipe.inputs], spec)
        self.steps.append(Step(stage.__name__, artifact.key, present, amount, recipe.described))
        return artifact

    def source(self, name: str, path: Path, counts: Callable[[str], bool] = bool) -> Artifact:
        """As in a store; what is used whole is read once for all cells of a grid."""
        find = partial(super().source, name, path, counts)
        return once(["source", self.root, name, path], find) if counts is bool else find()

    def by_content(self, artifact: Artifact, file: str) -> Artifact:
        """As in a store; itself where it is still to be built, whose content nobody knows."""
        return super().by_content(artifact, file) if (artifact.path / file).exists() else artifact

    def rates(self, stages: Collection[str]) -> dict[str, float]:
        """The median seconds that a unit of work took, over what this store built of these stages of late."""
        seconds: dict[str, list[float]] = {}
        for stage in stages:
            folders = [path for path in (self.root / stage).glob("*/*") if not path.suffix]
            recent = sorted(folders, key=lambda path: path.stat().st_mtime)[-RECENT:]
            for _, made in manifest.artifacts(recent):
                unit, amount = work(stage, [entry["stage"] for entry in made["inputs"]], made["spec"])
                seconds.setdefault(unit, []).append(made["seconds"] / amount)
        return {unit: median(times) for unit, times in seconds.items()}


class Lacking(LookupError):
    """An artifact is not in the store."""


class Kept(Plan):
    """A store that makes nothing, not even rows. Raises Lacking for what it has not."""

    def build(self, stage: Stage, inputs: Inputs, /, *, runtime: Runtime, **spec: Any) -> Artifact:
        """The artifact of the stage, where it is there."""
        artifact, present = self._find(digest.recipe(stage, inputs, spec))
        if not present:
            raise Lacking(stage.__name__)
        return artifact


def work(stage: str, inputs: Sequence[str], spec: dict[str, Any]) -> tuple[str, float]:
    """What a stage's duration grows with: a unit, and how many of them. For training, shards of rows times
    epochs, or steps of so many rows, or tokens, as its budget says; for every other stage itself."""
    if stage != "train":
        return stage, 1
    trainer = spec["trainer"]
    if trainer["budget"] == "steps":
        return f"steps of {trainer['batch_size'] * trainer.get('accumulate', 1)}", trainer["steps"]
    if trainer["budget"] == "tokens":
        return "tokens", trainer["tokens"]
    # Of them one is held out. Trainings of before answers were selected by themselves had those that were written.
    shards = sum(name in ("rows", "select", "distill") for name in inputs) - 1
    return "shards", max(shards, 1) * trainer["epochs"]


def levels(plans: Sequence[Plan]) -> list[list[int]]:
    """The cells, by their place, in levels: those of a level can run side by side without one waiting for what
    another builds, once all earlier levels have ended.

    A stage that several need is left to the cell that has most to build, so that shared stages stand in few
    cells: of nested data sizes, the largest builds the rows of all.
    """
    missing = [[step.key for step in plan.steps if not step.present] for plan in plans]
    builder: dict[str, int] = {}
    level: dict[int, int] = {}
    for cell in sorted(range(len(plans)), key=lambda number: -len(missing[number])):
        others = {builder.setdefault(key, cell) for key in missing[cell]} - {cell}
        level[cell] = 1 + max((level[other] for other in others), default=-1)
    return [
        [cell for cell in range(len(plans)) if level[cell] == depth] for depth in range(max(level.values()) + 1)
    ]


def describe(plans: Sequence[Plan]) -> None:
    """Print the number of cells, of distinct stages, of those in the store, and the estimated time."""
    steps = {step.key: step for plan in plans for step in plan.steps}
    missing = [step for step in steps.values() if not step.present]
    seconds, unknown = estimate(missing, plans[0].rates({step.stage for step in missing}))
    parts = ", ".join(f"{count} {stage}" for stage, count in Counter(step.stage for step in missing).items())
    print(f"{len(plans)} cells, {len(steps)} distinct stages, {len(steps) - len(missing)} of them in the store.")
    if missing:
        doubt = f", without {', '.join(unknown)}, which this store has not built yet" if unknown else ""
        duration = (
            f"about {clock(seconds)}{doubt}" if seconds else "how long it takes is not known before a first run"
        )
        print(f"To build: {parts}; {duration}.")


def estimate(steps: Sequence[Step], rates: dict[str, float]) -> tuple[float, list[str]]:
    """Seconds for these steps one after the other, and the stages of which the store knows no duration.

    A stage's duration is its work times what a unit of it took in this store of late.
    """
    known = [step for step in steps if step.work[0] in rates]
    unknown = sorted({step.stage for step in steps} - {step.stage for step in known})
    return sum(rates[unit] * amount for unit, amount in (step.work for step in known)), unknown


def clock(seconds: float) -> str:
    """A duration in words: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
