"""Where the time of a training goes: a few steps under torch's profiler, as a table and as a trace."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.profiler import ProfilerActivity, schedule

from sddx.records import PROFILE_FILE

log = logging.getLogger(__name__)

TRACE = "profile.json.gz"
STEPS = 3  # that are looked at, after one that warms up
TOLD, KEPT = 10, 50  # operations in the log and in the file, those that take longest first


class Profile(lightning.Callback):
    """Writes `profile.txt`, what the operations of a few steps took by themselves, and `profile.json.gz`, their
    trace for chrome://tracing or Perfetto; tells the longest of them. A training of one step is looked at whole."""

    def __init__(self, out: Path, steps: int) -> None:
        """`steps`: how many the training has."""
        self.out, self.warm = out, min(1, steps - 1)
        self.active = min(STEPS, steps - self.warm)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Start to look, from the step that training goes on from."""
        self.on = module.device.type
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on == "cuda" else [])]
        self.profiler = torch.profiler.profile(
            activities=kinds,
            schedule=schedule(wait=0, warmup=self.warm, active=self.active, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )
        self.profiler.start()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, item: Any, index: int) -> None:
        """Tell the profiler that a step ended."""
        self.profiler.step()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Stop; steps that were not all seen are written too."""
        self.profiler.stop()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Stop looking."""
        self.profiler.stop()

    def _write(self, profiler: Any) -> None:
        averages, by = profiler.key_averages(), f"self_{self.on}_time_total"
        (self.out / PROFILE_FILE).write_text(averages.table(sort_by=by, row_limit=KEPT) + "\n", encoding="utf-8")
        profiler.export_chrome_trace(str(self.out / TRACE))
        where = self.out.with_suffix("") / PROFILE_FILE  # without the ending that a folder has while it is built
        longest = averages.table(sort_by=by, row_limit=TOLD, max_name_column_width=40)
        log.info("%d steps under the profiler, also in %s:\n%s", self.active, where, longest)
