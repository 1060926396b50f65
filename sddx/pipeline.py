"""A run as its artifacts: self-data distillation of a depth-pruned model (arXiv 2410.09982), by its nouns."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

from sddx.config.build import Called, Node, only
from sddx.errors import UserError
from sddx.files.lines import lines
from sddx.records import CUT_FILE, OWN_PROMPTS, SHARES_FILE, Artifact, Count, Cut, Natural, Seed, Subject
from sddx.runtime import Runtime
from sddx.stages.folders import stage
from sddx.stages.inputs import count_rows, keyed_rows, model_at, read_by, task_files
from sddx.store import Inputs, Store

log = logging.getLogger(__name__)

# How a training is run, which changes its numbers by rounding alone and no key.
HOW_RUN = ("log_every", "checkpoint_every", "gradient_checkpointing", "strategy", "devices", "profile")
# What decides whether an answer may be trained on, where that is not the data set's own check (selfdata.check).
CHECKS = {
    name: {"_target_": f"sddx.data.checkers.{function}", "_partial_": True}
    for name, function in (("open", "open_answer"), ("none", "none"))
}
REFERENCE = Subject("unpruned", "reference", {})


@dataclass(frozen=True)
class Method:
    """The settings that decide what is built, as the configuration names them; `choices` name them in reports."""

    choices: Mapping[str, Any]
    model: Node
    calibration: Node
    pruning: Node
    dataset: Node
    validation: Natural
    generation: Annotated[Node, Called(4)]
    selfdata: Annotated[Node, Called(1)]
    loss: Node
    teacher: str | None
    tuning: Annotated[Node, Called(2)]
    trainer: Annotated[Node, Called(10)]
    max_length: Count
    evaluation: Annotated[Node, Called(4)]
    text: Node
    seed: Seed
    merging: Mapping[str, Any] | None = None
    speculation: Node | None = None
    drift: Node | None = None
    teacher_cache: Count | None = None


class Run:
    """Every artifact of one run, built where the store lacks it when it is first asked for; None where the method
    has none. A loss without terms trains nothing: the pruned model is evaluated as it is. With a store that only
    looks (sddx.sweep.plan) the same properties name what would be built. All raise UserError for a user's
    mistake."""

    def __init__(self, store: Store, runtime: Runtime, method: Method) -> None:
        from sddx.data.sources import pinned

        self.store, self.method = store, method
        self.runtime = replace(runtime, training=only(method.trainer, HOW_RUN))
        self.calibration, self.text = pinned(method.calibration), pinned(method.text)
        self.trains = bool(method.loss["terms"])
        self.dataset = pinned(method.dataset) if self.trains else method.dataset
        self.units = method.pruning.get("units", "blocks")
        self.loading = {name: method.model[name] for name in ("dtype", "attention")}
        self._results: dict[str, Artifact] = {}

    @cached_property
    def base(self) -> Artifact:
        """The unpruned model, where it lies."""
        return model_at(self.store, "model", self.method.model["path"], self.method.model["revision"])

    @cached_property
    def data(self) -> Artifact | None:
        """The rows of the data set in their order."""
        return self._prepared(self.dataset) if self.trains else None

    def _prepared(self, dataset: Node) -> Artifact:
        inputs: Inputs = {"files": read_by(self.store, dataset)}
        return self._make("prepare", inputs, dataset=dataset, validation=self.method.validation)

    @cached_property
    def scores(self) -> Artifact | None:
        """How much each unit matters; a cut by position needs none."""
        metric = self.method.pruning.get("metric")
        return None if metric is None else self.scored({"pruning": metric})

    def scored(self, metrics: dict[str, Any]) -> Artifact:
        """The scores of every unit under each of these metrics, on the calibration texts."""
        files = [*read_by(self.store, self.calibration), *task_files(self.store, metrics)]
        spec = {"metrics": keyed_rows(self.store, metrics), "units": self.units, "calibration": self.calibration}
        return self._make("score", {"base": self.base, "files": files}, **spec, **self.loading)

    @cached_property
    def pruned(self) -> Artifact:
        """The cut that the scores led to, with the proof that the model stays sound under it."""
        pruning = self.method.pruning
        spec = {"choose": pruning["choose"], "remove": pruning["remove"], "units": self.units}
        spec |= only(pruning, ("keep_pattern",)) if pruning.get("keep_pattern") else {}
        return self._make("prune", {"base": self.base, "scores": self.scores}, **spec, **self.loading)

    @cached_property
    def cut(self) -> Artifact:
        """The cut by what it keeps: metrics that choose the same units share all that follows."""
        return self.store.by_content(self.pruned, CUT_FILE)

    @cached_property
    def patch(self) -> Artifact | None:
        """What stands in for the removed parts."""
        settings = self.method.pruning["patch"]
        if settings["fit"] is None or not self.method.pruning["remove"]:
            return None
        files = read_by(self.store, self.calibration)
        spec = {"patch": _own(settings), "calibration": self.calibration}
        return self._make("patch", {"base": self.base, "cut": self.cut, "files": files}, **spec, **self.loading)

    @property
    def compressions(self) -> dict[str, Artifact | None]:
        """What is done to the base model, in order (`sddx.compression.kinds`). Inputs name the cut before others,
        because the order of inputs counts in keys."""
        return {"cut": self.cut, "patch": self.patch}

    @cached_property
    def rows(self) -> list[Artifact]:
        """The rows to learn from: the held-out ones, then the training rows in shards, so that a larger set shares
        those of a smaller one. Written by the unpruned model where the loss asks for self-data."""
        if not self.is_self_data:
            return self._references
        return [selected for _, selected in self._rewritten]

    @cached_property
    def answers(self) -> list[Artifact]:
        """What the unpruned model wrote to these rows, accepted or not; none where it writes nothing."""
        return [written for written, _ in self._rewritten] if self.is_self_data else []

    @cached_property
    def _references(self) -> list[Artifact]:
        if self.data is None:
            return []
        files = [self.data.path / "validation.jsonl", *sorted((self.data.path / "shards").iterdir())]
        return [self.store.source("rows", file) for file in files]

    @cached_property
    def _rewritten(self) -> list[tuple[Artifact, Artifact]]:
        """Of each shard the unpruned model's answers, and which of them may be trained on."""
        selfdata, pairs = self.method.selfdata, []
        spec = {"guided": self._is_guided, "rewrite": self.dataset["rewrite"], **self.loading}
        spec |= {"generation": self.method.generation}
        asked: Node = {"check": CHECKS.get(selfdata.get("check", "dataset"), self.dataset["check"])}
        asked["template"] = self.dataset["rewrite"] if self._is_guided else None
        bar: Any = {"what": "distilling", "unit": "row", "moved": "distill/written", "shown": "select/accepted"}
        with self.runtime.counting(sum(len(lines(shard.path)) for shard in self._references), **bar) as watched:
            for shard in self._references:
                inputs: Inputs = {"base": self.base, "shard": shard}
                spec["reference"] = self._reference(shard)
                written = self.store.build(stage("distill"), inputs, runtime=watched, **spec)
                inputs = {"shard": shard, "answers": written}
                pairs.append((written, self.store.build(stage("select"), inputs, runtime=watched, **asked)))
        return pairs

    @property
    def _is_guided(self) -> bool:
        return self.method.loss["data"] == "self"

    def _reference(self, shard: Artifact) -> str:
        """Whose references the prompts of a shard show; where they show none, that is no matter."""
        shown = self._is_guided and count_rows(shard)
        return self.method.selfdata.get("reference", "right") if shown else "right"

    @property
    def is_self_data(self) -> bool:
        """Whether the student learns from answers that the unpruned model writes."""
        return self.trains and self.method.loss["data"] != "reference"

    @cached_property
    def teacher(self) -> Artifact | None:
        """Another teacher than the unpruned model."""
        return model_at(self.store, "teacher", self.method.teacher) if self.method.teacher else None

    @cached_property
    def captured(self) -> list[Artifact]:
        """What the teacher says of every answer token of the rows, where it is not to run beside the student."""
        return self._captured(self.rows)

    def _captured(self, rows: list[Artifact]) -> list[Artifact]:
        from sddx.config.build import build

        if (k := self.method.teacher_cache) is None:
            return []
        spec = {"k": k, "temperature": build(self.method.loss).temperature, "max_length": self.method.max_length}
        spec |= {"selfdata": self._kept_answers, **self.loading}
        about: Inputs = {"base": self.base, "teacher": self.teacher}
        bar: Any = {"what": "capturing", "unit": "row", "moved": "capture/rows", "shown": "capture/mass"}
        with self.runtime.counting(sum(map(count_rows, rows)), **bar, mean=True) as watched:
            shards = [about | {"rows": each} for each in rows]
            return [self.store.build(stage("capture"), each, runtime=watched, **spec) for each in shards]

    @cached_property
    def student(self) -> Artifact | None:
        """The pruned model after it learned from the rows."""
        return self._trained(self.rows, self.captured, self.method.trainer) if self.trains else None

    def _trained(self, rows: list[Artifact], captured: list[Artifact], trainer: Node) -> Artifact:
        """A student of these rows, of which the first are held out, and of what a teacher said of them before."""
        method = self.method
        inputs: Inputs = {"base": self.base, "cut": self.cut, "held_out": rows[0], "rows": rows[1:]}
        inputs |= {**self.compressions, "teacher": self.teacher, "captured": captured}
        spec: Node = {"loss": method.loss, "tuning": method.tuning, "trainer": _learned(trainer)}
        spec |= {"max_length": method.max_length, "seed": method.seed}
        spec |= {"selfdata": self._kept_answers}
        spec |= {"teacher_cache": method.teacher_cache} if method.teacher_cache else {}
        return self._make("train", inputs, **spec, **self.loading)

    @property
    def _kept_answers(self) -> Node:
        """What becomes of answers after they were written and checked."""
        return _left(self.method.selfdata, ("check", "reference")) if self.is_self_data else {}

    @cached_property
    def written(self) -> Artifact | None:
        """What the unpruned model wrote, looked at."""
        if not self.is_self_data:
            return None
        inputs: Inputs = {"base": self.base, "cut": self.cut, "rows": self.rows[1:], **self.compressions}
        return self._make("written", inputs, max_length=self.method.max_length, **self.loading)

    @cached_property
    def _others(self) -> list[Run | str]:
        """The runs whose students are merged; of a finished one its folder."""
        asked = self.method.merging["students"] if self.method.merging else []
        return [each if isinstance(each, str) else Run(self.store, self.runtime, Method(**each)) for each in asked]

    @cached_property
    def parents(self) -> list[Artifact]:
        """The students that are merged. Raises UserError where they are of another cut or base."""
        return [self._finished(each) if isinstance(each, str) else self._other(each) for each in self._others]

    def _other(self, run: Run) -> Artifact:
        if (run.base, run.cut) != (self.base, self.cut) or run.student is None:
            raise UserError("merging.students: only students of this run's own base model and cut can be merged.")
        return run.student

    def _finished(self, folder: str) -> Artifact:
        from sddx.students.recovered import find_run

        run = find_run(folder)
        key, kept = run.summary["artifacts"].get("train"), self.pruned.path / CUT_FILE
        cut = Cut.load(kept) if kept.exists() else run.cut  # a plan does not know yet what will be cut
        built, patch = run.summary["artifacts"], self.patch and self.patch.key
        if run.trained is None or (built["model"], run.cut, built.get("patch")) != (self.base.key, cut, patch):
            raise UserError(
                f"merging.students: {folder} holds no student of this run's base, cut ({cut.name}) and patch. Name "
                "a run that was trained after the same ones."
            )
        return Artifact("train", key, run.trained)

    @cached_property
    def shares(self) -> Artifact | None:
        """How much of either parent each block of the merged model takes, where that is searched for."""
        merging = self.method.merging or {}
        if not (search := merging.get("search")):
            return None
        evaluation = _left(search["evaluation"], ("vllm",))
        inputs: Inputs = {"base": self.base, "cut": self.cut, "students": self.parents, **self.compressions}
        inputs["files"] = read_by(self.store, evaluation)
        spec: Node = {"method": merging["method"], "search": search["by"]}
        return self._make("shares", inputs, evaluation=keyed_rows(self.store, evaluation), **spec, **self.loading)

    @cached_property
    def merged(self) -> Artifact | None:
        """What the parents become."""
        if self.method.merging is None:
            return None
        inputs: Inputs = {"base": self.base, "cut": self.cut, "students": self.parents, **self.compressions}
        inputs["shares"] = self.store.by_content(self.shares, SHARES_FILE) if self.shares else None
        return self._make("merge", inputs, method=self.method.merging["method"], **self.loading)

    @cached_property
    def mixed(self) -> Artifact | None:
        """One student of the rows of all that are merged, trained as long as all: what a merge is to reach."""
        if not (self.method.merging or {}).get("mixed"):
            return None
        rows = [row for run in self._others if isinstance(run, Run) for row in run.rows[1:]]
        longer = _longer(self.method.trainer, len(self._others))
        return self._trained([self.rows[0], *rows], self._captured([self.rows[0], *rows]), longer)

    @cached_property
    def subjects(self) -> list[Subject]:
        """The models that are evaluated, first the one that all others are compared with."""
        pruned = self.compressions
        recovered = {**pruned, "student": self.student}
        models = [REFERENCE, Subject("pruned", "cut", pruned), Subject("recovered", "student", recovered)]
        return [*(models if self.trains else models[:2]), *self._merging(pruned)]

    def _merging(self, pruned: dict[str, Artifact | None]) -> Iterator[Subject]:
        """The students that are merged, but for this run's own; the one of all their data; what they become."""
        names = self.method.merging["names"] if self.method.merging else []
        for name, student in zip(names, self.parents, strict=True):
            if student != self.student:
                yield Subject(name, "parent", {**pruned, "student": student})
        if self.mixed:
            yield Subject("mixed", "mixed", {**pruned, "student": self.mixed})
        if self.merged:
            yield Subject("merged", "merged", {**pruned, "student": self.merged})

    @cached_property
    def prompts(self) -> dict[str, Artifact]:
        """The held-out rows whose prompts drafts are tried on: of the run's data set, and of those beside it."""
        from sddx.data.sources import pinned

        if (asked := self.method.speculation) is None:
            return {}
        others = {name: self._prepared(pinned(node)) for name, node in asked["datasets"].items()}
        return {OWN_PROMPTS: self.held_out} | {name: self._held_out(each) for name, each in others.items()}

    @cached_property
    def held_out(self) -> Artifact:
        """The rows of the data set that no student learns from, with their references."""
        from sddx.data.sources import pinned

        return self._held_out(self.data or self._prepared(pinned(self.method.dataset)))

    def _held_out(self, prepared: Artifact) -> Artifact:
        return self.store.source("rows", prepared.path / "validation.jsonl")

    @cached_property
    def drafts(self) -> list[Artifact]:
        """What each model but the unpruned one is worth as a draft for it, on each set of prompts."""
        spec = {"speculation": {**(self.method.speculation or {}), "datasets": {}}, **self.loading}
        return [
            self._make("draft", {"base": self.base, "rows": rows, **subject.inputs}, **spec)
            for subject in self.subjects[1:]
            for rows in self.prompts.values()
        ]

    @cached_property
    def drifts(self) -> list[Artifact]:
        """How far each model but the unpruned one moved from it, on the held-out rows and texts."""
        if self.method.drift is None:
            return []
        inputs: Inputs = {"base": self.base, "rows": self.held_out}
        inputs |= {"files": read_by(self.store, self.text)}
        inputs["rewrites"] = self.rows[0] if self.is_self_data else None
        spec: Node = {"measured": self.method.drift, "text": self.text, "max_length": self.method.max_length}
        spec |= {"selfdata": self._kept_answers}
        spec["check"] = self.dataset["check"] if self.method.drift.get("samples") else None
        return [
            self._make("drift", {**inputs, **subject.inputs}, **spec, **self.loading)
            for subject in self.subjects[1:]
        ]

    def result(self, subject: Subject) -> Artifact:
        """What the harness and held-out texts say of a model."""
        if subject.name not in self._results:
            inputs: Inputs = {"base": self.base, **subject.inputs}
            inputs["files"] = read_by(self.store, self.method.evaluation, self.text)
            asked = {"evaluation": self.evaluation, "text": self.text, **self.loading}
            self._results[subject.name] = self._make("evaluate", inputs, **asked)
        return self._results[subject.name]

    @cached_property
    def evaluation(self) -> Node:
        """The settings of the evaluation, of vLLM's where it evaluates; local rows by what they hold."""
        asked = self.method.evaluation
        asked = asked if asked.get("backend") == "vllm" else _left(asked, ("vllm",))
        return keyed_rows(self.store, asked)

    @cached_property
    def overlap(self) -> Artifact | None:
        """What the training rows, those of merged students among them, share with the evaluation's items."""
        if not (data := [*dict.fromkeys(self._all_data())]):
            return None
        spec = {name: self.evaluation.get(name) for name in ("tasks", "include", "limit", "split")}
        spec |= {name: each for name in ("data_dir", "side", "cluster") if (each := self.evaluation.get(name))}
        files = read_by(self.store, self.method.evaluation)
        return self._make("overlap", {"data": data, "files": files}, **spec)

    def _all_data(self) -> Iterator[Artifact]:
        """The rows of this run, and of those whose students are merged as far as they are in a store."""
        for each in (self, *self._others):
            data = self._finished_data(each) if isinstance(each, str) else each.data
            if data:
                yield data

    def _finished_data(self, folder: str) -> Artifact | None:
        from sddx.students.recovered import find_run

        run = find_run(folder)
        if (path := run.artifact("prepare")) is None:
            log.warning("overlap: the store has the rows of %s no more, so that they are not looked at", folder)
            return None
        return Artifact("prepare", run.summary["artifacts"]["prepare"], path)

    @cached_property
    def report(self) -> Artifact:
        """What was found, from all of it."""
        choices = self.method.choices
        if "evaluation.data_dir" in choices:
            choices = {**choices, "evaluation.data_dir": self.evaluation["data_dir"]}
        inputs = dict(self._in_order())
        results = [self.result(subject) for subject in self.subjects]
        subjects = [{"name": subject.name, "role": subject.role} for subject in self.subjects]
        spec = {"choices": choices, "subjects": subjects, "prompts": list(self.prompts)}
        return self._make("report", {**inputs, "results": results}, **spec)

    def _in_order(self) -> Iterator[tuple[str, Artifact | list[Artifact] | None]]:
        """All but the results, what fails soonest first: the rows, since nothing is to be paid for where they are
        missing; and before training is paid for, that the tasks can be evaluated at all."""
        for name in ("data", "base", "scores", "pruned", "patch"):
            yield name, getattr(self, name)
        for folder in (each for each in self._others if isinstance(each, str)):
            self._finished(folder)
        self.result(REFERENCE)
        for name in ("answers", "rows", "captured", "student", "mixed", "shares", "merged"):
            yield name, getattr(self, name)
        for name in ("drafts", "drifts", "written", "overlap"):
            yield name, getattr(self, name)

    def _make(self, name: str, inputs: Inputs, **spec: Any) -> Artifact:
        return self.store.build(stage(name), inputs, runtime=self.runtime, **spec)


def _left(settings: Node, out: tuple[str, ...]) -> Node:
    return {name: value for name, value in settings.items() if name not in out}


def _own(settings: Node) -> Node:
    """A node's own settings, without what calls it."""
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def _longer(trainer: Node, times: int) -> Node:
    """A training of so many times the rows: a budget that counts epochs grows with them, one of tokens or steps
    must be told."""
    from sddx.training.batches import COUNTED

    counted = COUNTED[trainer["budget"]]
    return trainer if counted == "epochs" else {**trainer, counted: times * trainer[counted]}


def _learned(trainer: Node) -> Node:
    """The settings of a training that decide what is learned, of the numbers of its budgets the one that counts.
    Dropout draws otherwise over packed rows."""
    from sddx.training.batches import COUNTED

    idle = set(COUNTED.values()) - {COUNTED.get(trainer.get("budget", ""))}
    idle |= set() if trainer.get("packing") else {"packing"}
    return _left(trainer, (*HOW_RUN, *idle))
