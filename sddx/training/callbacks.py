"""What a training does beside its steps: rows of metrics, the loss on held-out rows, checkpoints to resume from."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

import lightning
import torch

from sddx.errors import Interrupted
from sddx.parallel.distributed import any_of_us, as_in, barrier, rank, whole
from sddx.runtime import Runtime
from sddx.training.batches import Step, micro_batches
from sddx.training.module import Distiller

if TYPE_CHECKING:
    from sddx.data.encode import Encoded

log = logging.getLogger(__name__)


class Metrics(lightning.Callback):
    """Rows of metrics and the progress bar. `step` counts finished optimiser steps, from 1. `seconds` are those up
    to the last step, over all attempts."""

    def __init__(self, runtime: Runtime, planned: Sequence[Step], every: int) -> None:
        self.runtime, self.planned, self.every = runtime, planned, every
        self.earlier = self.seconds = 0.0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Draw the bar, from the step that training goes on from, and start the clock."""
        self.bar = self.runtime.progress(total=len(self.planned), what="training", unit="step")
        self.bar.update(trainer.global_step)
        self.started = self.logged_at = time.perf_counter()
        self.tokens, self.tokens_logged, self.before = 0, 0, module.attended_tokens

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, item: Any, index: int) -> None:
        """Move the bar; every so many steps log the losses and the tokens a second."""
        step, now = index + 1, time.perf_counter()
        self.tokens = module.attended_tokens - self.before
        self.seconds = self.earlier + now - self.started
        self.bar.update(1)
        if step % self.every == 0 or step == len(self.planned):
            rate = (self.tokens - self.tokens_logged) / (now - self.logged_at)
            self.logged_at, self.tokens_logged = now, self.tokens
            self.bar.set_postfix_str(f"loss {module.last['loss']:.4f}, {rate:,.0f} tokens/s", refresh=False)
            self.runtime.log(_row(step, "train", module.last | {"tokens_per_second": rate}))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Keep the tokens a second of the whole training."""
        self.tokens_per_second = self.tokens / (time.perf_counter() - self.started)
        self.bar.close()

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.earlier = self.seconds = state["seconds"]

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Close the bar, so that the error stands below it."""
        if hasattr(self, "bar"):
            self.bar.close()


class Validation(lightning.Callback):
    """The loss on held-out rows, every so many steps and at the end; remembers the best weights if asked."""

    def __init__(
        self,
        rows: Sequence[Encoded],
        step: Step,
        pad_id: int | None,
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
        """Where it is due, log the loss on held-out rows, and keep the weights if they are the best so far."""
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
        """The best loss, its step and its weights."""
        return {"kept": self.kept, "kept_step": self.kept_step, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.kept, self.kept_step, self.weights = state["kept"], state["kept_step"], state["weights"]


class Resume(lightning.Callback):
    """Saves what is needed to go on, every so many steps and when the process is told to end; runs last, so that
    it saves what others did.

    At SIGTERM the step is finished and saved, and Interrupted raised; where somebody handled that signal before
    (submitit, which queues a job again), they decide when the process ends, and it is only saved. In the last
    step there is nothing to save: the training is done.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every, self.interrupted = path, every, False
        self.before = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Listen for SIGTERM."""
        # Over Lightning's own handler, which would end without saving; Lightning puts back what was before.
        if current_thread() is main_thread():
            signal.signal(signal.SIGTERM, self.notice)

    def notice(self, number: int, frame: Any) -> None:
        """The handler of SIGTERM: note it for the end of the step, and call the one that was there before."""
        self.interrupted = True
        if callable(self.before):
            self.before(number, frame)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, item: Any, index: int) -> None:
        """Save where it is due or SIGTERM came. Raises Interrupted in the second case, where nobody else
        decides."""
        step, stopping = index + 1, any_of_us(self.interrupted, module.device)
        if step == module.steps_total or not (stopping or step % self.every == 0):
            return
        self.save(trainer)
        self.interrupted = False
        if stopping and not callable(self.before):
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


def _row(step: int, prefix: str, values: dict[str, float]) -> dict[str, Any]:
    return {"step": step} | {f"{prefix}/{name}": value for name, value in values.items()}
