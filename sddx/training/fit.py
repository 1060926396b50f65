"""Training from start to end: its settings, the plan, the loop, the summary."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from sddx.errors import UserError
from sddx.models.anatomy import bare, blocks, is_adapted
from sddx.parallel.distributed import put_together, rank, shard, world
from sddx.records import Count, Cut, Natural, NonNegative, Positive, Share
from sddx.runtime import Runtime
from sddx.students.teacher import SeparateTeacher, Teacher
from sddx.training.batches import COUNTED, Step, StepLoader, plan
from sddx.training.objective import Objective

if TYPE_CHECKING:
    from sddx.data.encode import Encoded
    from sddx.training.module import Distiller
    from sddx.training.writer import Writer


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a student is trained; called with what is to be trained, it does so. Raises UserError for settings that
    do not go together.

    An optimiser step is batch_size * accumulate examples; `budget` with `epochs`, `tokens` or `steps` says how many
    there are (`batches.plan`). AdamW with a cosine schedule after a `warmup` share of the steps; `clip` bounds the
    gradient norm; precision `32` computes in the dtypes that the weights have, `bf16` is automatic mixed precision.
    The loss on the held-out rows is taken every `validate_every` steps (None: at the end only) and at the end; keep
    `best` goes back to the weights with the lowest. `gradient_checkpointing` computes each block again in the
    backward pass instead of keeping what is inside it. With `packing` the rows of a micro-batch stand in one flat
    row and attend each within itself, so that nothing is padded, which changes numbers by rounding and by what
    dropout draws; for models of which `trial.require_packable` holds. With `profile` a few steps are looked at by
    torch's profiler (`profiling.Profile`).

    With strategy `ddp` and `fsdp` this is called in each of `devices` processes (`launch.launch`), which share out
    the micro-batches of every step; numbers differ from those of one process by rounding alone. With `ddp` each has
    all weights, with `fsdp` a shard of each. (Where nothing is trained, `fsdp` stands in `Runtime.shards`.)
    """

    budget: Literal["examples", "tokens", "steps"] = "examples"
    epochs: Natural = 3
    tokens: Count | None = None
    steps: Count | None = None
    batch_size: Count = 16
    accumulate: Count = 1
    pool: Count = 16
    learning_rate: Positive = 1e-3
    warmup: Share = 0.05
    weight_decay: NonNegative = 0.0
    clip: Positive | None = 1.0
    precision: Literal[32, "32", "bf16"] = 32
    head_chunk: Count = 256
    keep: Literal["last", "best"] = "last"
    validate_every: Count | None = None
    log_every: Count = 10
    checkpoint_every: Count = 200
    strategy: Literal["single", "ddp", "fsdp"] = "single"
    devices: Count = 1
    gradient_checkpointing: bool = False
    profile: bool = False
    packing: bool = False

    def __post_init__(self) -> None:
        if not getattr(self, counted := COUNTED[self.budget]):
            raise UserError(f"trainer.budget={self.budget} needs trainer.{counted}=..., 1 or more.")
        if self.keep == "best" and self.validate_every is None:
            raise UserError(
                "trainer.keep=best chooses among validations, and trainer.validate_every=null validates after the "
                "last step alone. Give trainer.validate_every=..., or use trainer.keep=last."
            )
        self._require_devices()

    def _require_devices(self) -> None:
        strategy, devices, accumulate = self.strategy, self.devices, self.accumulate
        if strategy == "single" and devices > 1:
            raise UserError(
                f"trainer.devices={devices} does not go with trainer.strategy={strategy}. Use trainer.strategy=ddp "
                "for a model that fits on one device, fsdp for one that does not, or trainer.devices=1."
            )
        if devices > accumulate and strategy != "single":
            raise UserError(
                f"trainer.devices={devices} share out the micro-batches of a step, and there are trainer.accumulate"
                f"={accumulate}: some would have nothing to do. Set trainer.accumulate to a multiple of {devices} "
                "and divide trainer.batch_size by the same. Numbers change by rounding alone, but for dropout and "
                "loss=squarehead, which hang on how a step is cut (loss=squarehead_token does not)."
            )

    def __call__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        objective: Objective,
        cut: Cut,
        rows_train: Sequence[Encoded],
        rows_validation: Sequence[Encoded],
        pad_id: int,
        seed: int,
        out: Path,
        runtime: Runtime,
        writer: Writer | None = None,
    ) -> dict[str, Any]:
        """Trains the student in place and gives a summary. Student and teacher are on `runtime.device` already;
        with `fsdp` they may be in host memory, and afterwards what is saved of the student (an adapter,
        or all weights) is whole in the first process alone.

        `out/resume` holds a checkpoint of every `checkpoint_every` steps, and of the step in which SIGTERM came
        (`Resume`); the store deletes it with the finished stage, so that a crash while the student is saved costs
        little. Where there is one, training goes on from it, sees the same examples and ends with the same weights;
        the rows up to it are logged again.

        Returns steps, examples, supervised_tokens, attended_tokens, tokens_per_second (attended tokens over the
        whole loop of this process), seconds (up to the last step, of all attempts), kept_step, and the terms of
        the last step (`train`) and of the kept weights on the held-out rows (`validation`, empty without such
        rows); with a `writer`, by which the student writes answers to the rows of a step, its `rollouts`
        (`writer.Tally`). Raises UserError for rows or a student that do not go with the settings,
        TrainingDiverged, with step and term, where a loss is not finite, and Interrupted after SIGTERM.
        """
        from sddx.training.callbacks import Metrics, Resume, Validation
        from sddx.training.loop import run
        from sddx.training.profiling import Profile

        if self.keep == "best" and not rows_validation:
            raise UserError("trainer.keep=best chooses by held-out rows, and there are none: use keep=last")
        if self.devices != world():
            raise ValueError(f"{self.devices} processes are to train, and {world()} do: call this through launch")
        planned = self._plan(rows_train, seed)
        module = self._module(student, teacher, objective, cut, seed, len(planned), writer)
        self._place(module, student, teacher, torch.device(runtime.device))
        metrics = Metrics(runtime, planned, self.log_every)
        held_out = Step.of(rows_validation, range(len(rows_validation)), self.batch_size)
        best = self.keep == "best"
        padding = None if self.packing else pad_id
        validation = Validation(rows_validation, held_out, padding, runtime, self.validate_every, best)
        resume = Resume(out / "resume" / "last.ckpt", self.checkpoint_every)
        student.train()
        loader = StepLoader(rows_train, planned, padding)
        looking = [Profile(out, len(planned))] if self.profile and rank() == 0 else []
        with self._attending(student, teacher):
            run(module, loader, [metrics, *looking, validation, resume], runtime, str(self.precision), out)
        student.eval()
        validation.restore_best(module)
        put_together(student, frozen=not is_adapted(student))
        return {
            "steps": len(planned),
            "examples": sum(step.examples for step in planned),
            "supervised_tokens": module.supervised_tokens,
            "attended_tokens": module.attended_tokens,
            "tokens_per_second": metrics.tokens_per_second,
            "seconds": metrics.seconds,
            "kept_step": validation.kept_step or len(planned),
            "train": module.last,
            "validation": validation.kept,
            **({"rollouts": asdict(writer.tally)} if writer else {}),
        }

    def _plan(self, rows: Sequence[Encoded], seed: int) -> list[Step]:
        return plan(
            rows,
            seed,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            budget=self.budget,
            epochs=self.epochs,
            tokens=self.tokens,
            steps=self.steps,
            pool=self.pool,
        )

    def _module(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        objective: Objective,
        cut: Cut,
        seed: int,
        steps: int,
        writer: Writer | None,
    ) -> Distiller:
        from sddx.training.module import Distiller

        return Distiller(
            student,
            teacher,
            objective,
            cut,
            seed,
            steps_total=steps,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            clip=self.clip,
            head_chunk=self.head_chunk,
            writer=writer,
        )

    def _attending(self, student: Any, teacher: Any) -> AbstractContextManager[None]:
        """Packed rows attend each within itself."""
        from sddx.models.varlen import varlen

        copies = [teacher.model] if isinstance(teacher, SeparateTeacher) else []
        return varlen(student, *copies) if self.packing else nullcontext()

    def _place(self, module: Distiller, student: Any, teacher: Any, device: torch.device) -> None:
        """Blocks that compute again, and weights in shards, where that was asked for."""
        if self.gradient_checkpointing:
            checkpoint_blocks(student)
        if self.strategy == "fsdp":
            shard(module, [*blocks(student), *getattr(teacher, "blocks", [])], device)
            if isinstance(teacher, SeparateTeacher):
                teacher.to(device)  # its embeddings, norm and head, which stay whole


def checkpoint_blocks(student: Any) -> None:
    """Lets each block be computed again in the backward pass. Raises UserError where the model cannot."""
    try:
        # The reentrant way needs inputs with gradients, which a frozen embedding does not give.
        bare(student).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"trainer.gradient_checkpointing=true does not go with this model: {error}") from None
