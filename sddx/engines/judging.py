"""Evaluation by vLLM, in a process of its own: the same harness with lm-eval's `VLLM` in place of `HFLM`."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from sddx.data.encode import TEMPLATE_SETTINGS
from sddx.engines import judging_worker
from sddx.engines.settings import Settings, failed
from sddx.errors import UserError
from sddx.models.load import free_memory

logger = logging.getLogger(__name__)
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM makes room for, from 0.10 on


@dataclass(frozen=True, kw_only=True)
class Engine(Settings):
    """What vLLM is started with where `evaluation.backend` is vllm. Several engines (through ray) share the items.
    The interpreter needs lm_eval and scipy as well; of sddx it uses this one.

    `adapter` merged: the weights with the trained adapter worked in, rounded to their dtype. apart: vLLM applies it
    beside them, rounded to the same dtype for itself."""

    adapter: Literal["merged", "apart"] = "merged"

    def require(self) -> None:
        """Raises UserError where vLLM is not there, or not GPUs enough, and where the interpreter has another
        lm-eval than this one, whose version the evaluation is filed under."""
        needs = ["vllm", "lm_eval", "scipy", *(["ray"] if self.data_parallel > 1 else [])]
        versions = self.require_packages(*needs, group="evaluation.vllm", instead="evaluation.backend=hf")
        if versions["lm_eval"] != (ours := metadata.version("lm_eval")):
            raise UserError(
                f"evaluation.vllm.python={self.python} has lm-eval {versions['lm_eval']}, and sddx runs with "
                f"{ours}: their numbers need not agree. Install lm_eval=={ours} there."
            )

    def require_adapter(self, rank: int | None) -> None:
        """Raises UserError where what is trained, an adapter of this rank or (None) all weights, cannot be applied
        apart from the weights, and is to be."""
        if self.adapter == "merged" or (rank and rank <= RANKS[-1]):
            return
        why = f"vLLM holds ranks up to {RANKS[-1]}, and tuning.rank={rank}" if rank else "this tuning has none"
        raise UserError(
            f"evaluation.vllm.adapter=apart is for an adapter, and {why}. Use evaluation.vllm.adapter=merged."
        )

    def judge(
        self,
        folder: Path,
        adapter: Path | None = None,
        *,
        evaluation: dict[str, Any],
        dtype: str,
        answered: Path,
        quiet: bool = True,
    ) -> dict[str, Any]:
        """What `harness.evaluate` returns with the settings `evaluation` and the file `answered`, for the model in
        a plain folder, with the `adapter` in another. What we hold on the GPU is freed first. Unless `quiet`, what
        the worker says, its progress included, is shown.

        Raises UserError as `evaluate` does, and where vLLM fails, with the end of its log.
        """
        free_memory()
        settings = {name: value for name, value in evaluation.items() if name != "vllm" and name[0] != "_"}
        asked = {"model": self._model(folder, adapter, dtype), "evaluation": settings, "answered": str(answered)}
        reply = self._reply(asked, quiet)
        if "mistake" in reply:
            raise UserError(*reply["mistake"])
        return reply["results"]

    def _reply(self, request: dict[str, Any], quiet: bool) -> dict[str, Any]:
        """The worker's answer. Its log is kept where it fails."""
        log = tempfile.NamedTemporaryFile(prefix="sddx-vllm-", suffix=".log", delete=False)
        logger.info("vLLM judges the model. Its log: %s", log.name)
        with log, tempfile.TemporaryDirectory() as name:
            asked, answer = Path(name) / "request.json", Path(name) / "answer.json"
            asked.write_text(json.dumps(request), encoding="utf-8")
            command = [self.python or sys.executable, "-P", judging_worker.__file__, str(asked), str(answer)]
            if status := _watched(command, log, quiet):
                raise failed(status, log.name)
            reply = json.loads(answer.read_text(encoding="utf-8"))
        Path(log.name).unlink()
        return reply

    def _model(self, folder: Path, adapter: Path | None, dtype: str) -> dict[str, Any]:
        """What lm-eval's VLLM is made with."""
        beside = {"lora_local_path": str(adapter), "max_lora_rank": _room(adapter)} if adapter else {}
        return {
            **beside,
            "pretrained": str(folder),
            "dtype": dtype,
            "tensor_parallel_size": self.tensor_parallel,
            "data_parallel_size": self.data_parallel,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "max_model_len": self.max_model_len,
            "batch_size": "auto",
            "generation_config": "vllm",  # nothing of the model's own settings but its end tokens
            "chat_template_args": TEMPLATE_SETTINGS,
            "enable_thinking": TEMPLATE_SETTINGS["enable_thinking"],  # lm-eval 0.4.13 forgets the one among them
        }


def _room(adapter: Path) -> int:
    """The least rank that vLLM makes room for and that the adapter fits in."""
    rank = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    return next(room for room in RANKS if room >= rank)


def _watched(command: list[str], log: Any, quiet: bool) -> int:
    """Run the worker to its end and return its status; `log` takes what it says, and so does the terminal unless
    `quiet`. The worker ends itself and its own processes when its standard input closes: with this one, whatever
    ended it."""
    env = {"VLLM_LOGGING_LEVEL": "WARNING", **os.environ}  # its own talk would hide the progress
    streams: Any = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT}
    with (
        open(log.name, errors="replace", newline="", encoding="utf-8") as said,
        subprocess.Popen(command, **streams, env=env, start_new_session=True) as worker,
    ):
        while True:
            status, new = worker.poll(), said.read()
            if not quiet:
                print(new, end="", file=sys.stderr, flush=True)
            if status is not None:
                return status
            time.sleep(0.2)
