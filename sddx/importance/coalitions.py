"""The model with any subset of its units, and what that is worth.

A coalition is the set of units that are present: a tuple of booleans, one for each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sddx.compression.branches import without
from sddx.compression.remove import apply_cut
from sddx.errors import UserError
from sddx.evaluation.harness import evaluate, require_tasks
from sddx.evaluation.scored import clusters_of
from sddx.evaluation.tasks import named_in_files, no_names, task_folders
from sddx.importance.score import Subject, Work
from sddx.models.anatomy import blocks, branches, decoder, final_norm, set_blocks
from sddx.models.outputs import entering, first, head_of, with_state
from sddx.parallel.distributed import agreed
from sddx.records import Batch, Count, Natural, Tasks, Units
from sddx.statistics.intervals import task_weights

Coalition = tuple[bool, ...]
Head = Callable[[Tensor], Tensor]  # states [tokens, width] -> float32 logits [tokens, vocabulary]


class Value(Protocol):
    """What coalitions are worth, more being better: a mean over independent draws (of texts, or of items of
    tasks)."""

    def of(self, subject: Subject, coalitions: Sequence[Coalition]) -> Tensor:
        """What each coalition is worth on each draw, [coalitions, draws] in float64; more is better."""
        ...

    def work(self, subject: Subject, coalitions: Sequence[Coalition]) -> Work:
        """What `of` runs."""
        ...


class Replay:
    """Runs subsets of a model's units on one batch. What a subset shares with the one before, from the first
    block on, is not computed again (`reuse`)."""

    def __init__(self, model: Any, units: Units, *, reuse: bool = True) -> None:
        self.model, self.units, self.reuse = model, units, reuse
        self.variants = [self._variants(block) for block in blocks(model)]

    def _variants(self, block: Any) -> dict[tuple[bool, bool], Any]:
        """The block as it is and without each of its branches; None without both."""
        variants = {(True, True): block, (False, False): None}
        if self.units.granularity != "blocks":
            kinds = branches(self.model)
            variants[False, True] = without(block, "attention", kinds["attention"])
            variants[True, False] = without(block, "feedforward", kinds["feedforward"])
        return variants

    def load(self, batch: Batch) -> None:
        """Take up a batch: note how the whole model calls each of its blocks."""
        device = next(self.model.parameters()).device
        self.calls: list[tuple[tuple, dict[str, Any]]] = []
        entered: list[Tensor] = []

        def note(block: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
            entered.append(entering(arguments, named))
            self.calls.append(with_state(None, arguments, named))

        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks(self.model)]
        try:
            decoder(self.model)(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                use_cache=False,
            )
        finally:
            for handle in handles:
                handle.remove()
        self.path: list[tuple[bool, bool]] = []  # of the last subset: what each block had, and the states after
        self.states = [entered[0]]

    def run(self, coalition: Coalition) -> Tensor:
        """The hidden state [batch, time, width] after the final norm."""
        path = _path(self.units, coalition)
        shared = _shared(self.path, path) if self.reuse else 0
        del self.states[shared + 1 :]
        for place in range(shared, len(path)):
            block, hidden = self.variants[place][path[place]], self.states[-1]
            arguments, named = with_state(hidden, *self.calls[place])
            self.states.append(hidden if block is None else first(block(*arguments, **named)))
        self.path = path
        norm = final_norm(self.model)
        return self.states[-1] if norm is None else norm(self.states[-1])


def _path(units: Units, coalition: Coalition) -> list[tuple[bool, bool]]:
    """Of every block, whether its attention and its feed-forward branch are present."""
    if units.granularity == "blocks":
        return [(present, present) for present in coalition]
    present = {units.unit(number): here for number, here in enumerate(coalition)}
    return [
        (present.get(("attention", block), True), present.get(("feedforward", block), True))
        for block in range(units.total)
    ]


def _shared(last: Sequence[Any], path: Sequence[Any]) -> int:
    """The first blocks that two paths have in common."""
    differing = (place for place, (old, new) in enumerate(zip(last, path, strict=False)) if old != new)
    return next(differing, len(last))


def _passes(path: Sequence[tuple[bool, bool]], total: int) -> float:
    """Blocks over those of the whole model; a branch is half a block."""
    return sum(map(sum, path)) / 2 / total


class OfLogits:
    """A value that is read off the logits of calibration text: the mean over each sequence's labelled tokens.

    `sequences`: how many of the texts (null: all). `chunk`: tokens that the head is applied to at once.
    """

    def __init__(self, *, sequences: Count | None = 64, reuse: bool = True, chunk: Count = 256) -> None:
        self.sequences, self.reuse, self.chunk = sequences, reuse, chunk

    def of(self, subject: Subject, coalitions: Sequence[Coalition]) -> Tensor:
        """[coalitions, sequences], float64. Raises UserError where no text has a label."""
        distinct = _in_order(coalitions)
        replay = Replay(subject.model, subject.units, reuse=self.reuse)
        columns: list[Tensor] = []
        batches = subject.first(self.sequences)
        total = len(distinct) * len(batches)
        with subject.runtime.progress(total=total, what=self.label, unit="pass") as bar, torch.no_grad():
            for batch in batches:
                replay.load(batch)
                full = replay.run((True,) * len(subject.units))
                rows = []
                for coalition in distinct:
                    rows.append(self._sequences(subject, batch, replay.run(coalition), full))
                    bar.update(1)
                columns.append(torch.stack(rows)[:, (batch.labels >= 0).any(1)])  # texts of one token have none
        values = torch.cat(columns, dim=1)
        if not values.shape[1]:
            raise UserError(f"{self.label} needs labels, and no calibration text has a token after the first.")
        if not values.isfinite().all():
            raise UserError(
                f"{self.label}: not finite; the model overflows in this dtype. Use float32 or bfloat16."
            )
        place = {coalition: number for number, coalition in enumerate(distinct)}
        return agreed(values[[place[coalition] for coalition in coalitions]])

    def work(self, subject: Subject, coalitions: Sequence[Coalition]) -> Work:
        """What `of` runs. A branch counts as half a block."""
        units, texts = subject.units, sum(len(batch.input_ids) for batch in subject.first(self.sequences))
        last, passes = _path(units, (True,) * len(units)), 2.0  # to note the blocks' calls, and with all units
        for coalition in (distinct := _in_order(coalitions)):
            path = _path(units, coalition)
            passes += _passes(path[_shared(last, path) if self.reuse else 0 :], units.total)
            last = path
        return Work(body=texts * passes, head=texts * len(distinct) * self.heads)

    def _sequences(self, subject: Subject, batch: Batch, hidden: Tensor, full: Tensor) -> Tensor:
        """The value of each sequence; NaN for one without labels."""
        to_logits = head_of(subject.model)
        labelled = (batch.labels >= 0).to(hidden.device)
        labels = batch.labels.to(hidden.device)[labelled]
        pieces = zip(*(t.split(self.chunk) for t in (hidden[labelled], full[labelled], labels)), strict=True)
        worth = torch.cat([self.token_values(lambda x: to_logits(x).float(), *piece) for piece in pieces])
        owner = labelled.nonzero()[:, 0]
        sums = worth.new_zeros(len(labelled), dtype=torch.float64).index_add_(0, owner, worth.double())
        return (sums / labelled.sum(1)).cpu()

    label = "value"
    heads = 1  # times that the head is applied to a token

    def token_values(self, to_logits: Head, hidden: Tensor, full: Tensor, labels: Tensor) -> Tensor:
        """The value of each token, from the states with the coalition and with all units [tokens, width]."""
        raise TypeError(f"{type(self).__name__} gives no value")


class Loss(OfLogits):
    """Minus the cross-entropy: what loss Shapley shares out (arXiv 2407.16286)."""

    label = "loss of coalitions"

    def token_values(self, to_logits: Head, hidden: Tensor, full: Tensor, labels: Tensor) -> Tensor:
        """log p(label) of each token, in nats: [tokens]."""
        return -nn.functional.cross_entropy(to_logits(hidden), labels, reduction="none")


class LogitDistance(OfLogits):
    """Minus the L2 distance to the logits of the whole model: what logit Shapley shares out (arXiv 2407.16286)."""

    label = "logits of coalitions"
    heads = 2

    def token_values(self, to_logits: Head, hidden: Tensor, full: Tensor, labels: Tensor) -> Tensor:
        """Minus the distance between each token's two rows of logits: [tokens]."""
        return -torch.linalg.vector_norm(to_logits(hidden) - to_logits(full), dim=-1)


WHERE = "pruning.metric.value"  # where a value stands, for messages


class TaskScore:
    """The average score of evaluation tasks on their selection items, as reports take it: tasks count equally,
    whatever their number of items, and items of one `cluster` are one draw.

    Selection items are another `split` of a task's data than the report's, those of the same split that are on that
    `side` (sddx.evaluation.items), or the task `<task>_selection` (among the package's own, or in the folder
    `include`). With `oracle`, they are the very items that are reported: an upper bound, not a method.

    Every coalition is evaluated whole, by the `primary` metric, named by task (not named: the task's own), and in
    the chat template where that is asked for (`chat_template` None: where there is one).
    """

    def __init__(
        self,
        *,
        tasks: Tasks,
        limit: Count | None,
        include: str | None = None,
        batch_size: Count = 64,
        shots: Natural | Mapping[str, Natural] | None = None,
        split: Mapping[str, str] | None = None,
        primary: Mapping[str, str] | None = None,
        chat_template: bool | None = None,
        data_dir: str | None = None,
        side: Literal["selection", None] = None,
        cluster: Mapping[str, str] | None = None,
        oracle: bool = False,
    ) -> None:
        if wrong := no_names(tasks, WHERE, shots=shots, split=split, primary=primary):
            raise UserError(*wrong)
        self.limit, self.include, self.batch_size = limit, include, batch_size
        self.chat_template, self.data_dir = chat_template, data_dir
        self.side: Any = "report" if oracle and side else side
        self.split = {} if oracle else split or {}
        as_named = oracle or side is not None
        self.tasks = [task if as_named or task in self.split else _selection(task, include) for task in tasks]
        asked = dict(zip(self.tasks, tasks, strict=True))
        self.primary = _by_name(asked, primary or {})
        self.cluster = _by_name(asked, cluster or {})
        self.shots = _by_name(asked, shots) if isinstance(shots, Mapping) else shots

    def require(self, where: str = WHERE) -> None:
        """Raises UserError where the tasks cannot be evaluated by these settings, which stand at `where`."""
        settings: dict[str, Any] = {"split": self.split, "shots": self.shots, "primary": self.primary}
        settings |= {"include": self.include, "data_dir": self.data_dir, "cluster": self.cluster}
        require_tasks(where, tasks=self.tasks, limit=self.limit, **settings)

    def of(self, subject: Subject, coalitions: Sequence[Coalition]) -> Tensor:
        """The average score under each coalition, in its `draws`: [coalitions, draws] in float64."""
        known: dict[Coalition, Tensor] = {}
        quiet = replace(subject, runtime=replace(subject.runtime, quiet=True))
        with subject.runtime.progress(total=len(set(coalitions)), what="tasks of coalitions", unit="model") as bar:
            for coalition in set(coalitions):
                known[coalition] = self._items(quiet, coalition)
                bar.update(1)
        return agreed(torch.stack([known[coalition] for coalition in coalitions]))

    def work(self, subject: Subject, coalitions: Sequence[Coalition]) -> Work:
        """What `of` runs. A branch counts as half a block."""
        total = subject.units.total
        return Work(models=sum(_passes(_path(subject.units, kept), total) for kept in set(coalitions)))

    def _items(self, subject: Subject, coalition: Coalition) -> Tensor:
        removed = [number for number, present in enumerate(coalition) if not present]
        if len(removed) == len(coalition):
            raise UserError("a task cannot be scored without any unit: give the metric a keep above 0.")
        as_asked = self.chat_template
        unpruned = apply_cut(subject.model, subject.units.cut(removed))
        try:
            results = evaluate(
                subject.model,
                subject.tokenizer,
                subject.runtime,
                tasks=self.tasks,
                include=self.include,
                batch_size=self.batch_size,
                limit=self.limit,
                shots=self.shots,
                split=self.split,
                data_dir=self.data_dir,
                side=self.side,
                cluster=self.cluster,
                primary=self.primary,
                chat_template=bool(subject.tokenizer.chat_template) if as_asked is None else as_asked,
            )
        finally:
            set_blocks(subject.model, unpruned)
        return _of_tasks(results["tasks"])


def _of_tasks(records: Mapping[str, Mapping[str, Any]]) -> Tensor:
    """The `draws` of evaluated tasks, each item with the weight that it has in the macro average."""
    by_task = task_weights(list(records), {task: record["part_of"] for task, record in records.items()})
    total = sum(len(record["samples"]) for record in records.values())
    scores: list[float] = []
    weights: list[float] = []
    owners: list[Hashable] = []
    for task, record in records.items():
        samples = record["samples"]
        scores += [sample["score"] for sample in samples]
        weights += [by_task[task] * total / len(samples)] * len(samples)
        owners += [(task, owner) for owner in clusters_of(samples) or range(len(samples))]
    return draws(torch.tensor(scores).double(), torch.tensor(weights).double(), owners)


def draws(scores: Tensor, weights: Tensor, owners: Sequence[Hashable]) -> Tensor:
    """The weighted mean of items in parts, one for each of the `owners` that are drawn: the parts have that mean,
    and vary as a ratio of sums does (Cochran 1977, chapter 6). Of k owners of n items with weights w of mean 1 and
    the mean m it is m + k / n sum of w (score - m) over an owner's items: where each item is a draw and weighs 1,
    its score."""
    numbers: dict[Hashable, int] = {}
    places = torch.tensor([numbers.setdefault(owner, len(numbers)) for owner in owners])
    share = len(numbers) / len(scores)
    sums, sizes = (scores.new_zeros(len(numbers)).index_add_(0, places, x) for x in (weights * scores, weights))
    return share * sums + (1 - share * sizes) * (weights * scores).mean()


def _in_order(coalitions: Sequence[Coalition]) -> list[Coalition]:
    """Each once, so that neighbours share their first blocks."""
    return sorted(set(coalitions), reverse=True)


def _by_name(asked: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is given for tasks, by the names of what is evaluated for them (`asked`: the task by that name)."""
    known = {name: settings[key] for name, task in asked.items() for key in (task, name) if key in settings}
    return {**{key: value for key, value in settings.items() if key not in asked.values()}, **known}


def _selection(task: str, include: str | None) -> str:
    """The name under which a task's selection items stand. Raises UserError where it has none."""
    name = task if task.endswith("_selection") else f"{task}_selection"
    if name not in named_in_files(task_folders(include, WHERE)):
        raise UserError(
            f"{WHERE}: the task {task!r} has no selection items ({name} is no task), and report items must not "
            f"choose what is removed. Name another split of its data (split: {{{task}: validation}}), set aside "
            "some of its items (side=selection), use a task that has them, or set oracle=true for the upper bound "
            "that it is."
        )
    return name
