"""Lightning's loop over a planned training."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy

from sddx.parallel.distributed import rank
from sddx.runtime import Runtime
from sddx.store import keep_rows
from sddx.training.batches import StepLoader
from sddx.training.module import Distiller

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed"}


class OneOfSeveral(SingleDeviceStrategy):
    """For Lightning each process trains alone on its device; what they do together is in `distributed`. The
    first one alone writes files.

    Its own DDP would average gradients, and sum them up once for each of a step's backward passes.
    """

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that speaks for all."""
        return rank() == 0

    def teardown(self) -> None:
        """Lightning's own without its move to host memory: shards are put together where they are."""
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def run(
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
    exists = checkpoint.exists()
    if checkpoint.parent.exists() and rank() == 0:
        done = torch.load(checkpoint, weights_only=True)["global_step"] if exists else 0
        for row in keep_rows(out, done + 1):
            runtime.log(row)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        trainer.fit(module, loader, ckpt_path=str(checkpoint) if exists else None, weights_only=True)


def _with_number(device: torch.device) -> torch.device:
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
