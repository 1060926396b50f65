"""Training from start to end: plan, loop, progress, held-out loss, resuming."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from sddx.models.anatomy import bare, blocks, is_adapted
from sddx.models.teacher import SeparateTeacher
from sddx.records import Cut, Interrupted, UserError
from sddx.runtime import Runtime
from sddx.store import keep_rows
from sddx.training.batches import Step, StepLoader, micro_batches, plan
from sddx.training.distributed import any_of_us, as_in, barrier, put_together, rank, shard, whole, world
from sddx.training.module import Distiller, Teacher
from sddx.training.objective import Objective, one_of

if TYPE_CHECKING:
    from sddx.data.encode import Encoded

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed"}
STRATEGIES = ("single", "ddp", "fsdp")
log = logging.getLogger(__name__)


def fit(
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
    *,
    budget: str = "examples",
    epochs: int = 3,
    tokens: int | None = None,
    steps: int | None = None,
    batch_size: int = 16,
    accumulate: int = 1,
    pool: int = 16,
    learning_rate: float = 1e-3,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    precision: str = "32",
    head_chunk: int = 256,
    keep: str = "last",
    validate_every: int | None = None,
    log_every: int = 10,
    checkpoint_every: int = 200,
    strategy: str = "single",
    devices: int = 1,
    gradient_checkpointing: bool = False,
) -> dict[str, Any]:
    """Trains the student in place and gives a summary; student and teacher are on `runtime.device` already.

    strategy `ddp` and `fsdp`: this is one of `devices` processes (`launch.launch`), which share out the
    micro-batches of every step; numbers differ from those of one process by rounding alone. With `ddp` each has
    all weights, with `fsdp` a shard of each: student and teacher may then still be in the computer's memory, and
    afterwards what is saved of the student (an adapter, or all weights) is whole in the first process alone.
    `gradient_checkpointing` computes each block again in the backward pass instead of keeping what is inside it.

    An optimiser step is batch_size * accumulate examples; `budget` with `epochs`, `tokens` or `steps` says
    how many there are (`batches.plan`). AdamW with a cosine schedule after a `warmup` share of the steps;
    `clip` bounds the gradient norm; precision `32` computes in the dtypes that the weights have, `bf16` is
    automatic mixed precision. The loss on the held-out rows is taken every `validate_every` steps (None: at
    the end only) and at the end; keep `best` goes back to the weights with the lowest.

    `out/resume` holds a checkpoint of every `checkpoint_every` steps, and of the step in which SIGTERM came
    (`Resume`); the store deletes it with the finished stage, so that a crash while the student is saved costs
    little. Where there is one, training goes on from it, sees the same examples and ends with the same weights;
    the rows up to it are logged again.

    Returns steps, examples, supervised_tokens, attended_tokens, tokens_per_second (attended tokens over the
    whole loop of this process), kept_step, and the terms of the last step (`train`) and of the kept weights
    on the held-out rows (`validation`, empty without such rows). Raises UserError for bad settings,
    TrainingDiverged, with step and term, where a loss is not finite, and Interrupted after SIGTERM.
    """
    one_of("precision", precision, tuple(PRECISIONS))
    one_of("keep", keep, ("last", "best"))
    if keep == "best" and not rows_validation:
        raise UserError("trainer.keep=best chooses by held-out rows, and there are none: use keep=last")
    require_devices(strategy, devices, accumulate)
    if devices != world():
        raise ValueError(f"{devices} processes are to train, and {world()} do: call this through launch")
    planned = plan(
        rows_train,
        seed,
        batch_size=batch_size,
        accumulate=accumulate,
        budget=budget,
        epochs=epochs,
        tokens=tokens,
        steps=steps,
        pool=pool,
    )
    module = Distiller(
        student,
        teacher,
        objective,
        cut,
        seed,
        steps_total=len(planned),
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        head_chunk=head_chunk,
    )
    if gradient_checkpointing:
        checkpoint_blocks(student)
    if strategy == "fsdp":
        shard(module, [*blocks(student), *getattr(teacher, "blocks", [])], torch.device(runtime.device))
        if isinstance(teacher, SeparateTeacher):
            teacher.to(runtime.device)  # its embeddings, norm and head, which stay whole
    metrics = Metrics(runtime, planned, log_every)
    held_out = Step.of(rows_validation, range(len(rows_validation)), batch_size)
    validation = Validation(rows_validation, held_out, pad_id, runtime, validate_every, keep == "best")
    resume = Resume(out / "resume" / "last.ckpt", checkpoint_every)
    student.train()
    loader = StepLoader(rows_train, planned, pad_id)
    _run(module, loader, [metrics, validation, resume], runtime, precision, out)
    student.eval()
    validation.restore_best(module)
    put_together(student, frozen=not is_adapted(student))
    return {
        "steps": len(planned),
        "examples": sum(step.examples for step in planned),
        "supervised_tokens": module.supervised_tokens,
        "attended_tokens": sum(step.totals.attended for step in planned),
        "tokens_per_second": metrics.tokens_per_second,
        "kept_step": validation.kept_step or len(planned),
        "train": module.last,
        "validation": validation.kept,
    }


class Metrics(lightning.Callback):
    """Rows of metrics and the progress bar. `step` counts finished optimiser steps, from 1."""

    def __init__(self, runtime: Runtime, planned: Sequence[Step], every: int) -> None:
        self.runtime, self.planned, self.every = runtime, planned, every

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.bar = self.runtime.progress(total=len(self.planned), what="training", unit="step")
        self.bar.update(trainer.global_step)
        self.started = self.logged_at = time.perf_counter()
        self.tokens = self.tokens_logged = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, item: Any, index: int) -> None:
        step = index + 1
        self.tokens += item[0].totals.attended
        self.bar.update(1)
        if step % self.every == 0 or step == len(self.planned):
            now = time.perf_counter()
            rate = (self.tokens - self.tokens_logged) / (now - self.logged_at)
            self.logged_at, self.tokens_logged = now, self.tokens
            self.bar.set_postfix_str(f"loss {module.last['loss']:.4f}, {rate:,.0f} tokens/s", refresh=False)
            self.runtime.log(_row(step, "train", module.last | {"tokens_per_second": rate}))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.tokens_per_second = self.tokens / (time.perf_counter() - self.started)
        self.bar.close()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class Validation(lightning.Callback):
    """The loss on held-out rows, every so many steps and at the end; remembers the best weights if asked."""

    def __init__(
        self,
        rows: Sequence[Encoded],
        step: Step,
        pad_id: int,
        runtime: Runtime,
        every: int | None,
        best: bool,
    ) -> None:
        self.rows, self.step, self.pad_id, self.runtime = rows, step, pad_id, runtime
        self.every, self.best = every, best
        self.kept: dict[str, float] = {}
        self.kept_step = 0
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, item: Any, index: int) -> None:
        step = index + 1
        due = step == module.steps_total or (self.every and step % self.every == 0)
        if not (due and self.rows):
            return
        with trainer.precision_plugin.val_step_context():
            values = module.validate(self.step, micro_batches(self.rows, self.step, self.pad_id))
        self.runtime.log(_row(step, "validation", values))
        if not self.best:
            self.kept, self.kept_step = values, step
        elif not self.kept or values["loss"] < self.kept["loss"]:
            self.kept, self.kept_step = values, step
            self.weights = {n: whole(value.detach()).cpu().clone() for n, value in module.trainable().items()}

    def restore_best(self, module: Distiller) -> None:
        """Puts the remembered weights back, if any."""
        with torch.no_grad():
            for name, value in module.trainable().items():
                if name in self.weights:
                    value.copy_(as_in(value, self.weights[name]))

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "kept_step": self.kept_step, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept, self.kept_step, self.weights = state["kept"], state["kept_step"], state["weights"]


class Resume(lightning.Callback):
    """Saves what is needed to go on, every so many steps and when the process is told to end; runs last, so that
    it saves what others did.

    At SIGTERM the step is finished and saved, and Interrupted raised; where somebody handled that signal before
    (submitit, which queues a job again), they decide when the process ends, and it is only saved. In the last
    step there is nothing to save: the training is done.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every, self.told = path, every, False
        self.before = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        # Over Lightning's own handler, which would end without saving; Lightning puts back what was before.
        if current_thread() is main_thread():
            signal.signal(signal.SIGTERM, self.notice)

    def notice(self, number: int, frame: Any) -> None:
        self.told = True
        if callable(self.before):
            self.before(number, frame)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, item: Any, index: int) -> None:
        step, told = index + 1, any_of_us(self.told, module.device)
        if step == module.steps_total or not (told or step % self.every == 0):
            return
        self.save(trainer)
        self.told = False
        if told and not callable(self.before):
            if rank() == 0:
                log.warning(
                    "SIGTERM: saved after step %d of %d; the same command goes on", step, module.steps_total
                )
            barrier()  # the first of several to raise ends them all, and this is to be said before
            raise Interrupted

    def save(self, trainer: Any) -> None:
        """Writes the checkpoint, in one process; the others wait."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(temporary, weights_only=False)
        if rank() == 0:
            os.replace(temporary, self.path)
        barrier()


class OneOfSeveral(SingleDeviceStrategy):
    """For Lightning each process trains alone on its device; what they do together is in `distributed`. The
    first one alone writes files.

    Its own DDP would average gradients, and sum them up once for each of a step's backward passes.
    """

    @property
    def is_global_zero(self) -> bool:
        return rank() == 0

    def teardown(self) -> None:
        """Lightning's own without its move to the computer's memory: shards are put together where they are."""
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def _run(
    module: Distiller,
    loader: StepLoader,
    callbacks: list[lightning.Callback],
    runtime: Runtime,
    precision: str,
    out: Path,
) -> None:
    """One Lightning epoch over the whole plan, from the checkpoint where there is one."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    device = torch.device(runtime.device)
    trainer = lightning.Trainer(
        accelerator=device.type,
        strategy=OneOfSeveral(_with_number(device)),
        precision=PRECISIONS[precision],
        max_epochs=1,
        logger=False,
        callbacks=callbacks,
        plugins=[LightningEnvironment()],  # one process, whatever cluster this runs on
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    checkpoint = out / "resume" / "last.ckpt"
    found = checkpoint.exists()
    if checkpoint.parent.exists() and rank() == 0:
        done = torch.load(checkpoint, weights_only=True)["global_step"] if found else 0
        for row in keep_rows(out, done + 1):
            runtime.log(row)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        trainer.fit(module, loader, ckpt_path=str(checkpoint) if found else None, weights_only=True)


def _with_number(device: torch.device) -> torch.device:
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def require_devices(strategy: str, devices: int, accumulate: int) -> None:
    """Raises UserError where a strategy is not known or so many devices cannot share a step."""
    one_of("trainer.strategy", strategy, STRATEGIES)
    if devices < 1 or (strategy == "single" and devices > 1):
        raise UserError(
            f"trainer.devices={devices} does not go with trainer.strategy={strategy}. Use trainer.strategy=ddp for "
            "a model that fits on one device, fsdp for one that does not, or trainer.devices=1."
        )
    if devices > accumulate and strategy != "single":
        raise UserError(
            f"trainer.devices={devices} share out the micro-batches of a step, and there are trainer.accumulate="
            f"{accumulate}: some would have nothing to do. Set trainer.accumulate to a multiple of {devices} and "
            "divide trainer.batch_size by the same, which changes no number but for rounding."
        )


def checkpoint_blocks(student: Any) -> None:
    """Lets each block be computed again in the backward pass. Raises UserError where the model cannot."""
    try:
        # The reentrant way needs inputs with gradients, which a frozen embedding does not give.
        bare(student).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"trainer.gradient_checkpointing=true does not go with this model: {error}") from None


def _row(step: int, prefix: str, values: dict[str, float]) -> dict[str, Any]:
    return {"step": step} | {f"{prefix}/{name}": value for name, value in values.items()}
