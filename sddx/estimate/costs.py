"""What a run is made of: pieces of work that runs share, and from them hours on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sddx.config.build import build, only, with_defaults
from sddx.config.shared import once
from sddx.errors import UserError
from sddx.estimate.devices import Device
from sddx.estimate.efforts import Effort, Judging
from sddx.estimate.skeleton import Size, removed, shape_of, size_of, skeleton
from sddx.estimate.texts import (
    DOWNLOADS,
    LONGEST,
    STATED,
    Rows,
    Texts,
    counter,
    items_of,
    rows_of,
    texts_of,
)
from sddx.models.anatomy import is_adapted
from sddx.models.narrow import built, refusals, smallest
from sddx.records import Cut
from sddx.store.digest import digest
from sddx.training.tuning import adapted_weights, lora

WRITTEN = 1.5  # the length of a written answer in those of its reference; ours
# Settings of which a student is made.
LEARNED = (
    "pruning", "calibration", "dataset", "validation", "generation", "selfdata", "loss", "tuning", "trainer",
    "seed", "max_length", "teacher", "teacher_cache",
)  # fmt: skip
ADAPTER = ("rank", "alpha", "dropout", "targets")


@dataclass(frozen=True)
class Part:
    """A piece of work that is done once however many runs need it (`key`): FLOPs of reading and of learning, steps
    of decoding with the bytes and the FLOPs of each, and tokens by kind, for the table."""

    stage: str
    key: str
    reading: float = 0.0
    learning: float = 0.0
    steps: float = 0.0
    step_bytes: float = 0.0
    step_flops: float = 0.0
    blocks: int = 0
    tokens: dict[str, float] = field(default_factory=dict)

    def seconds(self, device: Device) -> float | None:
        """On this device; None where its speed is not known."""
        if device.reading is None or device.learning is None or device.bandwidth is None:
            return None
        computed = self.step_flops / device.reading
        step = max(self.step_bytes / device.bandwidth, computed, self.blocks * device.launch)
        return self.reading / device.reading + self.learning / device.learning + self.steps * step


class Estimate:
    """What a configuration costs, by what each of its `stages` says of itself (`sddx.stages.cost`); `assumed` and
    `unknown` say what it does not know."""

    def __init__(self, config: Mapping[str, Any], stages: Mapping[str, Any]) -> None:
        """Raises UserError where the model's dimensions are not known or too much is removed."""
        self.config, self.model, self.stages = with_defaults(config), config["model"], stages
        self.shape = once(["shape", self.model], lambda: shape_of(self.model))
        self.unpruned = once(["size", self.model], lambda: size_of(skeleton(self.shape, self.model["dtype"])))
        self.cut, self.pruned = once(["pruned", *self.cutting], self._sized)
        folder = Path(str(self.model["path"])).expanduser()
        here = folder if folder.is_dir() else None
        self.tokens, self.turn = once(["counter", here], lambda: counter(here))

    def varied(self, **changes: Any) -> Estimate:
        """The same model under the same cut, with other settings of its training."""
        made = copy(self)
        made.config = {**self.config, **changes}
        if "tuning" in changes:
            vars(made).pop("_tuned", None)
        return made

    @property
    def cutting(self) -> list[Any]:
        """All that the pruned model hangs on."""
        return [self.model, self.units, self.config["pruning"]["remove"]]

    def _sized(self) -> tuple[Cut, Size]:
        student, cut = self._student()
        return cut, size_of(student)

    def _student(self) -> tuple[Any, Cut]:
        student = skeleton(self.shape, self.model["dtype"])
        return student, removed(student, self.units, self.config["pruning"]["remove"])

    @property
    def units(self) -> str:
        """What is removed: blocks, or branches."""
        return self.config["pruning"].get("units", "blocks")

    @cached_property
    def rows(self) -> Rows:
        """The rows that are trained on."""
        about = self.config["dataset"], self.config["validation"]
        return once(["rows", self.model["path"], *about], lambda: rows_of(*about, self.tokens, self.turn))

    @cached_property
    def calibration(self) -> Texts:
        """The texts on which units are scored and patches fitted."""
        return self._texts("calibration")

    @cached_property
    def text(self) -> Texts:
        """The held-out texts."""
        return self._texts("text")

    def _texts(self, group: str) -> Texts:
        node = self.config[group]
        return once(["texts", self.model["path"], node], lambda: texts_of(node, self.tokens))

    @cached_property
    def fit(self) -> Any:
        """How a patch is fitted; None where nothing stands in for what is removed."""
        pruning = self.config["pruning"]
        return build(pruning["patch"]["fit"]) if pruning["patch"]["fit"] and pruning["remove"] else None

    @property
    def trains(self) -> bool:
        """Whether there is a term to train by; without one the recovered model is the pruned one."""
        return bool(self.config["loss"]["terms"])

    @cached_property
    def _tuned(self) -> tuple[int, str, bool]:
        """What there is to say of the student as it is trained; itself it is not kept."""

        def look() -> tuple[int, str, bool]:
            student = self.student()
            trained = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
            return trained, adapted_weights(student), is_adapted(student)

        return once(["tuned", *self.cutting, self.config["tuning"]], look)

    @property
    def trained(self) -> int:
        """Parameters that are trained, patches apart."""
        return self._tuned[0] if self.trains else 0

    @property
    def adapter(self) -> str:
        """Which kinds of weights have an adapter and which have none."""
        return self._tuned[1]

    def student(self) -> Any:
        """The pruned model on the meta device, as it is trained."""
        tuning = self.config["tuning"]
        student, _ = self._student()
        with torch.device("meta"):
            if "quantization" not in tuning:
                return build(tuning)(student, 0)
            # An adapter has the same weights on a model in 4 bit, which this is not.
            return lora(student, 0, **only(tuning, ADAPTER))

    @property
    def is_full(self) -> bool:
        """Whether the student's own weights are trained, and no adapter on them."""
        return not self._tuned[2]

    @property
    def by_vllm(self) -> bool:
        """Whether vLLM evaluates."""
        return self.config["evaluation"].get("backend") == "vllm"

    @property
    def own_weights(self) -> int:
        """Bytes of weights that a model has of its own, beside those of the unpruned one: a student that was
        trained whole, or one that was merged."""
        apart = (self.is_full and self.trains) or self.config.get("merging")
        return self.pruned.weight_bytes if apart else 0

    @property
    def compared(self) -> Iterator[tuple[str, list[Any]]]:
        """The models that are held against the unpruned one, by role, each with the values that it hangs on."""
        learned = [self.config[name] for name in LEARNED]
        yield "pruned", [self.config[name] for name in ("pruning", "calibration")]
        if self.trains:
            yield "recovered", learned
        if merging := self.config.get("merging"):
            for student in merging["students"]:
                made = isinstance(student, Mapping)
                yield "recovered", [student[name] for name in LEARNED] if made else [student]
            if merging["mixed"]:
                yield "mixed", [*learned, merging["students"]]
            yield "merged", [*learned, merging]

    @property
    def rewrites(self) -> bool:
        """Whether the unpruned model writes the answers."""
        return self.trains and self.config["loss"]["data"] != "reference"

    @property
    def needs_teacher(self) -> bool:
        """Whether a term looks at a teacher that runs beside the student."""
        return build(self.config["loss"]).needs_teacher and not self.config["teacher_cache"]

    @cached_property
    def teacher(self) -> Size:
        """The unpruned model, or another one; taken to be as large where it is not in a folder here."""
        other = self.config["teacher"]
        if other is None or not Path(other).expanduser().is_dir():
            return self.unpruned
        return size_of(skeleton(shape_of({"path": other, "revision": None}), self.model["dtype"]))

    @property
    def answer(self) -> float:
        """Tokens of an answer that is trained on."""
        return self.rows.answer * (WRITTEN if self.config["loss"]["data"] != "reference" else 1)

    def parts(self) -> list[Part]:
        """All pieces of work of a run, in the order of its stages; those that run no model on much have none."""
        return [part for stage in self.stages.values() if hasattr(stage, "parts") for part in stage.parts(self)]

    def judging(self, settings: Mapping[str, Any]) -> Judging:
        """The tasks that a model is judged by under these settings."""
        asked = Judging.of(settings)
        same = settings.get("encoding", "same") == "same" and self.config["trainer"].get("strategy") != "fsdp"
        return replace(asked, packed=same and asked.batch_size > 1 and self._is_packable(asked))

    def _is_packable(self, asked: Judging) -> bool:
        """Whether what texts begin with can be read once, as a narrow model of the same architecture tells."""
        from sddx.evaluation.likelihoods import is_packable

        longest = int(LONGEST * asked.longest(written=False))

        def ask() -> bool:
            with suppress(UserError, *refusals()):
                options = {"attn_implementation": self.model["attention"]}
                return is_packable(built(smallest(self.shape), torch.float32, **options), longest)
            return False

        return once(["packable", self.model, longest], ask)

    def part(
        self, stage: str, about: Any, size: Size, effort: Effort, *, cached: float = 0, rows: float = 0
    ) -> Part:
        """A piece of work by a model of this size, which hangs on the settings `about`. `cached`: tokens that a
        step of decoding attends to, over all `rows` that it writes one to."""
        loading = {name: self.model[name] for name in ("path", "revision", "dtype", "attention")}
        flops = {"reading": effort.reading, "learning": effort.learning, "steps": effort.steps}
        tokens = {"read": effort.read, "written": effort.written, "trained": effort.trained}
        step = size.weight_bytes + cached * size.cache_bytes
        key = digest([stage, loading, about])
        computed = size.step(rows, cached)
        return Part(stage, key, **flops, step_bytes=step, step_flops=computed, blocks=size.blocks, tokens=tokens)

    @property
    def captured(self) -> float:
        """Bytes of what is captured of a teacher: at every answer token a number and a logarithm for each of its
        likeliest tokens, and the logarithm of the rest."""
        rows = self.rows.count + self.config["validation"]
        return rows * min(self.answer, self.config["max_length"]) * (8 * (self.config["teacher_cache"] or 0) + 4)

    @property
    def assumed(self) -> bool:
        """Whether the rows of a hub data set are taken to be as long as GSM8K's, because theirs are not known."""
        dataset = self.config["dataset"]
        return "split" in dataset and not dataset.get("data_files") and dataset["name"] not in STATED

    @property
    def unknown(self) -> list[str]:
        """Evaluation tasks whose size is not known here, and which are not counted."""
        return [task for task in self.config["evaluation"]["tasks"] if items_of(task) is None]

    def disk(self) -> dict[str, float]:
        """Bytes on disk: the model and large data sets as they come, what the run keeps, and what it takes for a
        while. Of checkpoints
        to resume from, each the weights that are trained with two moments, the next is written before the last is
        deleted; vLLM reads merged weights."""
        student = self.pruned.weight_bytes if self.is_full else 4 * self.trained
        sizes: dict[str, float] = {"model": self.unpruned.weight_bytes}
        read = ["calibration", "text", *(["dataset"] if self.trains else [])]
        names = {self.config[node].get("name") for node in read if not self.config[node].get("data_files")}
        sizes |= {"data": size} if (size := sum(DOWNLOADS.get(name, 0) for name in names)) else {}
        sizes |= {"captured of the teacher": self.captured} if self.config["teacher_cache"] else {}
        sizes |= {"student": student, "while training": 2 * 3 * student} if self.trains else {}
        if merging := self.config.get("merging"):
            made = sum(isinstance(each, Mapping) for each in merging["students"]) + bool(merging["mixed"])
            sizes["students that are merged"] = made * student
            sizes["merged"] = self.pruned.weight_bytes
            sizes["while merging"] = (len(merging["students"]) + 1) * self.pruned.weight_bytes
        return sizes | ({"while evaluating": self.pruned.weight_bytes} if self.by_vllm else {})


def distinct(parts: Sequence[Part]) -> list[Part]:
    """Each piece of work once."""
    return list({part.key: part for part in parts}.values())


def seconds(parts: Sequence[Part], device: Device) -> dict[str, float] | None:
    """Seconds by stage of these parts, each counted once; None where the device's speed is not known."""
    total: dict[str, float] = {}
    for part in distinct(parts):
        spent = part.seconds(device)
        if spent is None:
            return None
        total[part.stage] = total.get(part.stage, 0.0) + spent
    return total
