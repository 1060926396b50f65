"""The LightningModule: a student, its objective, and optionally a teacher that is only looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from sddx.errors import UserError
from sddx.models.outputs import run
from sddx.parallel.distributed import as_in, of_optimizer, share, sum_gradients, summed, whole
from sddx.records import Batch, Cut
from sddx.students.teacher import Teacher
from sddx.training.batches import Step
from sddx.training.head import token_loss
from sddx.training.objective import Objective, Totals, layer_pairs
from sddx.training.writer import Tally, Writer


class TrainingDiverged(UserError):
    """A term or the gradient stopped being finite."""


class Distiller(lightning.LightningModule):
    """Trains the student's trainable parameters; one Lightning batch is one whole optimiser step.

    The step's micro-batches are accumulated here (manual optimisation), each term already divided by the
    totals of the step, so the gradient does not depend on how the step was cut. The teacher is not a
    submodule: neither optimiser nor checkpoint sees it. `teacher(batch, states=bool) -> Outputs`.
    Of several processes each takes its share of them, and gradients and values are summed over all (`distributed`).
    Randomness (dropout) is a function of (seed, step, micro-batch), whichever process has it. With a `writer` the
    student itself writes answers to a step's rows before the step.

    Raises UserError where the objective needs a teacher and has none, or holds layers and the cut leaves no
    pair of them.
    """

    teacher: Teacher | None

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        objective: Objective,
        cut: Cut,
        seed: int,
        *,
        steps_total: int,
        learning_rate: float,
        warmup: float = 0.0,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        head_chunk: int = 256,
        writer: Writer | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        self.student = student
        object.__setattr__(self, "teacher", teacher)  # past nn.Module, which would register it
        self.objective, self.cut, self.seed = objective, cut, seed
        self.steps_total, self.learning_rate, self.warmup = steps_total, learning_rate, warmup
        self.weight_decay, self.clip, self.head_chunk = weight_decay, clip, head_chunk
        self.writer = writer
        self.supervised_tokens = self.attended_tokens = 0
        self.last: dict[str, float] = {}
        _check(objective, cut, teacher)

    def forward(self, batch: Batch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the step's loss, and of every term of it, unweighted and without gradients:
        name -> scalar."""
        objective = self.objective
        teacher = None
        if self.teacher is not None and objective.needs_teacher:
            # First: where it shares the student's weights it must be done before a graph exists.
            teacher = self.teacher(batch.for_teacher, states=objective.needs_states)
        student = run(self.student, **batch.inputs, states=objective.needs_states)
        losses: list[Tensor] = []
        values: dict[str, Tensor] = {}
        if terms := objective.token_terms:
            form: dict[str, Any] = {"divisor": max(totals.labelled, 1), "chunk": self.head_chunk}
            form["teacher_labels"] = batch.for_teacher.labels
            loss, values = token_loss(terms, student, teacher, batch.labels, **form)
            losses.append(loss)
        if teacher is not None:
            for name, term in objective.layer_terms.items():
                value = term.value(student, teacher, batch.attention_mask, self.cut, totals)
                losses.append(term.weight * value)
                values[name] = value.detach()
        return torch.stack(losses).sum(), values

    def _share(self, batch: Batch, step: Step, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss, values = self(batch.to(self.device), step.totals)
        return loss * weight, {name: value * weight for name, value in values.items()}

    def training_step(self, item: tuple[Step, list[Batch]], index: int) -> None:
        """One optimiser step over this process's share of the micro-batches."""
        step, batches = self.writer(*item, index, self.steps_total) if self.writer else item
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        seen: list[dict[str, Tensor]] = []
        for number, batch, weight in share(batches):
            torch.manual_seed(((self.seed * 1_000_003 + index) * 1_000_003 + number) % 2**63)
            loss, values = self._share(batch, step, weight)
            self.manual_backward(loss)
            seen.append(values)
        total = _summed(seen)
        row = self._finite(total | {"loss": self._weighted(total)}, index)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        sum_gradients(weights)
        if self.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(weights, self.clip)
            row |= self._finite({"gradient_norm": whole(norm)}, index)
        row["learning_rate"] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        self.supervised_tokens += step.totals.labelled
        self.attended_tokens += step.totals.attended
        self.last = row | {"supervised_tokens": self.supervised_tokens}
        if self.writer:
            self.last["written_tokens"] = self.writer.tally.tokens

    @torch.no_grad()
    def validate(self, step: Step, batches: Sequence[Batch]) -> dict[str, float]:
        """Every term, and the weighted `loss`, over held-out rows taken as one step; dropout off."""
        self.student.eval()
        total = _summed([self._share(batch, step, weight)[1] for _, batch, weight in share(batches)])
        self.student.train()
        return {name: value.item() for name, value in (total | {"loss": self._weighted(total)}).items()}

    def configure_optimizers(self) -> Any:
        """AdamW over what is trained, with a linear warm-up and a cosine decay."""
        optimizer = torch.optim.AdamW(self._groups(), lr=self.learning_rate, fused=True)
        factor = cosine_with_warmup(self.steps_total, self.warmup)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch as it is."""
        return batch  # micro-batches move one at a time

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained alone, whole even where it lies in shards, and the supervised tokens so far."""
        trainable = self.trainable()
        checkpoint["state_dict"] = {n: whole(v) for n, v in checkpoint["state_dict"].items() if n in trainable}
        states = checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [of_optimizer(state, lambda number, v: whole(v)) for state in states]
        checkpoint["tokens"] = self.supervised_tokens, self.attended_tokens
        if self.writer:
            checkpoint["written"] = asdict(self.writer.tally)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put weights and optimiser back, cut as they are held here. Raises UserError for other parameters."""
        weights = self.trainable()
        if checkpoint["state_dict"].keys() != weights.keys():
            raise UserError("the checkpoint to resume from holds other parameters than this student trains")
        checkpoint["state_dict"] = {name: as_in(weights[name], v) for name, v in checkpoint["state_dict"].items()}
        numbered = [weight for group in self._groups() for weight in group["params"]]
        states = checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [of_optimizer(s, lambda n, v: as_in(numbered[n], v)) for s in states]
        self.supervised_tokens, self.attended_tokens = checkpoint["tokens"]
        if self.writer:
            self.writer.tally = Tally(**checkpoint["written"])

    def _groups(self) -> list[dict[str, Any]]:
        """What is trained, as the optimiser takes it: matrices, which decay, and all else, which does not (norms
        and factors, whose neutral value is not 0, and biases)."""
        weights = list(self.trainable().values())
        matrices, others = ([w for w in weights if (w.dim() > 1) is is_matrix] for is_matrix in (True, False))
        groups = [(matrices, self.weight_decay), (others, 0.0)]
        return [{"params": params, "weight_decay": decay} for params, decay in groups if params]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def _weighted(self, values: dict[str, Tensor]) -> Tensor:
        return torch.stack([term.weight * values[name] for name, term in self.objective.terms.items()]).sum()

    def _finite(self, values: dict[str, Tensor], index: int) -> dict[str, float]:
        """The values as numbers; raises TrainingDiverged, with step and name, where one is not finite."""
        numbers = {name: value.item() for name, value in values.items()}
        for name, number in numbers.items():
            if not math.isfinite(number):
                raise TrainingDiverged(
                    f"training stopped at step {index + 1} of {self.steps_total}: {name} is {number}. "
                    f"The learning rate is {self.learning_rate}: lower it, or look at this step's examples"
                )
        return numbers


def cosine_with_warmup(steps: int, warmup: float) -> Callable[[int], float]:
    """The factor of the learning rate at step 0, 1, ..: up a line over the first ceil(warmup * steps) steps,
    which ends at 1, then down half a cosine that would reach 0 at step `steps`."""
    rising = math.ceil(warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))

    return factor


def _summed(seen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Over this process's micro-batches, and over the processes."""
    return summed({name: torch.stack([values[name] for values in seen]).sum() for name in seen[0]})


def _check(objective: Objective, cut: Cut, teacher: Teacher | None) -> None:
    if objective.needs_teacher and teacher is None:
        raise UserError(f"the terms {', '.join(objective.terms)} need a teacher, and there is none")
    for name, term in objective.layer_terms.items():
        if not layer_pairs(cut, term.junction):
            raise UserError(f"{name}, junction={term.junction}: no layer to compare in the cut {cut.kept}")
