"""What a run is made of, stage by stage: tokens, FLOPs, and from them hours on a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sddx.build import build
from sddx.data.shards import SHARD_ROWS
from sddx.estimate.devices import Device
from sddx.estimate.skeleton import Size, removed, shape_of, size_of, skeleton
from sddx.estimate.texts import STATED, counter, items_of, limited, rows_of, text_tokens
from sddx.records import Cut, UserError
from sddx.store.digest import digest

TEMPLATE = 80  # tokens that a rewriting template adds; ours
WRITTEN = 1.5  # the length of a written answer in those of its reference; ours
LONGEST = 2.5  # the longest answer of a batch in mean ones, which the batch waits for; ours
SCORED = 2048  # tokens at which calibration texts are cut, and texts in a batch
TEXT_BATCH = 32
# Settings of which a student is made.
LEARNED = (
    "pruning", "calibration", "dataset", "validation", "generation", "selfdata", "loss", "tuning", "trainer",
    "seed", "max_length", "teacher",
)  # fmt: skip
ADAPTER = ("rank", "alpha", "dropout", "targets")


@dataclass(frozen=True)
class Part:
    """A piece of work that is done once however many runs need it (`key`): FLOPs of reading and of learning, steps
    of decoding and the bytes that each reads, and tokens by kind, for the table."""

    stage: str
    key: str
    reading: float = 0.0
    learning: float = 0.0
    steps: float = 0.0
    step_bytes: float = 0.0
    blocks: int = 0
    tokens: dict[str, float] = field(default_factory=dict)

    def seconds(self, device: Device) -> float | None:
        """On this device; None where its speed is not known."""
        if device.reading is None or device.learning is None or device.bandwidth is None:
            return None
        step = max(self.step_bytes / device.bandwidth, self.blocks * device.launch)
        return self.reading / device.reading + self.learning / device.learning + self.steps * step


class Estimate:
    """What a configuration costs; `assumed` and `unknown` say what it does not know."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises UserError where the model's dimensions are not known or too much is removed."""
        self.config, self.model = config, config["model"]
        self.shape = shape_of(self.model)
        self.unpruned = size_of(skeleton(self.shape, self.model["dtype"]))
        student, self.cut = self._student()
        self.pruned = size_of(student)
        folder = Path(str(self.model["path"])).expanduser()
        self.tokens = counter(folder if folder.is_dir() else None)
        self.rows = rows_of(config["dataset"], self.tokens)

    def _student(self) -> tuple[Any, Cut]:
        student = skeleton(self.shape, self.model["dtype"])
        pruning = self.config["pruning"]
        return student, removed(student, pruning.get("units", "blocks"), pruning["remove"])

    @cached_property
    def trained(self) -> int:
        """Parameters that are trained."""
        if not self.config["loss"]["terms"]:
            return 0
        return sum(weight.numel() for weight in self.student().parameters() if weight.requires_grad)

    def student(self) -> Any:
        """The pruned model on the meta device, as it is trained."""
        tuning = self.config["tuning"]

        # An adapter has the same weights on a quantised model.
        settings = {name: tuning[name] for name in ("_partial_", *ADAPTER) if name in tuning}
        target = "full" if self.is_full else "lora"
        student, _ = self._student()
        with torch.device("meta"):
            return build({"_target_": f"sddx.training.tuning.{target}", **settings})(student, 0)

    @property
    def is_full(self) -> bool:
        """Whether every weight is trained."""
        return self.config["tuning"]["_target_"].endswith(".full")

    @property
    def needs_teacher(self) -> bool:
        """Whether a term looks at the unpruned model."""
        terms = self.config["loss"]["terms"].values()
        return any(not term["_target_"].endswith(".Supervised") for term in terms)

    def parts(self) -> list[Part]:
        """All pieces of work of a run, in the order of its stages; of stages=[score], that alone (with the metrics
        of the run's own cut)."""
        if self.config["stages"]:
            return [part for part in [self._score()] if part is not None]
        found = [self._score(), *self._distill(), self._train(), *self._evaluate()]
        return [part for part in found if part is not None]

    def _part(self, stage: str, about: Any, **work: Any) -> Part:
        how = {name: self.model[name] for name in ("path", "revision", "dtype", "attention")}
        return Part(stage, digest([stage, how, about]), **work)

    def _score(self) -> Part | None:
        pruning, node = self.config["pruning"], self.config["calibration"]
        if pruning.get("metric") is None:
            return None
        texts, length = text_tokens(node, self.tokens, SCORED)
        read = texts * length * passes(pruning["metric"], self.unpruned.blocks)
        about = [pruning["metric"], pruning.get("units"), node]
        flops = read * (self.unpruned.prefill(max(int(length), 1)))
        return self._part("score", about, reading=flops, tokens={"read": read})

    def _distill(self) -> list[Part]:
        data, generation = self.config["loss"]["data"], self.config["generation"]
        if data == "reference" or not self.config["loss"]["terms"]:
            return []
        guided, shown = data == "self", self.shown
        written = min(WRITTEN * self.rows.answer, generation["max_new_tokens"])
        steps = min(LONGEST * written, generation["max_new_tokens"])
        batch, size = self.writing, self.unpruned
        each = size.weight_bytes + batch * size.cache_bytes * (shown + steps / 2)
        about = [{k: v for k, v in self.config["dataset"].items() if k != "size"}, generation, guided]
        shards = [self.config["validation"], *_shards(self.rows.count)]
        return [
            self._part(
                "distill",
                [about, number, rows],
                reading=rows * shown * size.prefill(int(shown) or 1),
                steps=steps * -(-rows // batch),
                step_bytes=each,
                blocks=size.blocks,
                tokens={"read": rows * shown, "written": rows * written},
            )
            for number, rows in enumerate(shards)
            if rows
        ]

    @property
    def shown(self) -> float:
        """Tokens of the prompt that an answer is written to: with the reference in it, or alone."""
        guided = self.config["loss"]["data"] == "self"
        return self.rows.prompt + (TEMPLATE + self.rows.answer if guided else 0)

    @property
    def writing(self) -> int:
        """Rows that are written side by side."""
        return self.config["generation"].get("batch_size") or SHARD_ROWS

    def _train(self) -> Part | None:
        loss, trainer = self.config["loss"], self.config["trainer"]
        if not loss["terms"]:
            return None
        row = self.rows.prompt + self.rows.answer * (WRITTEN if loss["data"] != "reference" else 1)
        row = min(row, self.config["max_length"])
        read = row * self._examples(row)
        # Backward is as much again for the states, and once more for weights that are trained themselves; a block
        # that is checkpointed is computed twice.
        passes = 2 + self.is_full + bool(trainer.get("gradient_checkpointing"))
        flops = read * passes * self.pruned.prefill(int(row) or 1)
        shown = read * self.unpruned.prefill(int(row) or 1) if self.needs_teacher else 0
        flops += 2 * passes * self.pruned.head * self._examples(row) * self.rows.answer
        about = [self.config[name] for name in LEARNED]
        return self._part("train", about, learning=flops, reading=shown, tokens={"trained": read})

    def _examples(self, row: float) -> float:
        trainer = self.config["trainer"]
        if trainer["budget"] != "examples" and trainer[trainer["budget"]] is None:
            raise UserError(f"trainer.budget={trainer['budget']} needs trainer.{trainer['budget']}=...")
        if trainer["budget"] == "steps":
            return trainer["steps"] * trainer["batch_size"] * trainer["accumulate"]
        if trainer["budget"] == "tokens":
            return trainer["tokens"] / max(self.rows.answer, 1)
        return trainer["epochs"] * self.rows.count

    def _evaluate(self) -> Iterable[Part]:
        evaluation, text = self.config["evaluation"], self.config["text"]
        models = {"unpruned": self.unpruned, "pruned": self.pruned}
        models |= {"recovered": self.pruned} if self.config["loss"]["terms"] else {}
        names = {"unpruned": (), "pruned": ("pruning", "calibration"), "recovered": LEARNED}
        for name, size in models.items():
            rest = [self.config[each] for each in names[name]]
            work = self._judge(size, name != "unpruned")
            yield self._part(f"evaluate {name}", [evaluation, text, rest], **work)

    def _judge(self, size: Size, beside: bool) -> dict[str, Any]:
        """The work of all tasks and of the held-out text (`beside`: the unpruned model reads it too)."""
        evaluation, total = self.config["evaluation"], {"reading": 0.0, "steps": 0.0}
        read = written = 0.0
        batch = evaluation["batch_size"]
        for task in evaluation["tasks"]:
            if (items := items_of(task)) is None:
                continue
            count, length = limited(evaluation["limit"], task, items.count), self.length(task)
            read += count * items.passes * length
            # lm-eval computes the logits of every token of a prompt.
            total["reading"] += count * items.passes * length * (size.prefill(int(length) or 1) + 2 * size.head)
            written += count * items.written
            total["steps"] += min(LONGEST * items.written, 256) * -(-count // batch)
        texts, length = text_tokens(self.config["text"], self.tokens, SCORED)
        flops = size.prefill(int(length) or 1) + (self.unpruned.prefill(int(length) or 1) if beside else 0)
        total["reading"] += texts * length * flops
        kinds = {"read": read + texts * length * (1 + beside), "written": written}
        step = size.weight_bytes + batch * size.cache_bytes * max(map(self.length, evaluation["tasks"]))
        return {**total, "step_bytes": step, "blocks": size.blocks, "tokens": kinds}

    def length(self, task: str) -> float:
        """Tokens of one request to a task, with its shots."""
        items, shots = items_of(task), self.config["evaluation"]["shots"]
        if items is None:
            return 0
        count = (shots.get(task) if isinstance(shots, Mapping) else shots) or 0
        return (items.preamble + items.characters * (1 + count)) / 4

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
        """Bytes on disk: the model as it comes, and what the run keeps."""
        student = self.pruned.weight_bytes if self.is_full else 4 * self.trained
        # A checkpoint to resume from holds the weights that are trained and two moments of each.
        return {"model": self.unpruned.weight_bytes, "student": student, "while training": 3 * student}


def passes(metric: Mapping[str, Any], blocks: int) -> float:
    """Forward passes over the calibration text that a metric takes."""
    kind = str(metric["_target_"]).rsplit(".", 1)[-1]
    if kind in ("LeaveOneOut", "Greedy"):
        return (1 + blocks) * (1 if kind == "LeaveOneOut" else max(metric["until"], 1))
    if kind == "Shapley":
        return metric["orders"] * blocks / 2
    return {"RandomSubnetworks": metric.get("count", 10), "Taylor": 3}.get(kind, 1)


def _shards(rows: int) -> list[int]:
    whole, rest = divmod(rows, SHARD_ROWS)
    return [SHARD_ROWS] * whole + ([rest] if rest else [])


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
