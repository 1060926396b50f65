"""Self-data written by vLLM, in processes of its own. vLLM is an extra, and may live in a Python of its own.

The engines start with the first rows and stay for the next ones, until `engines.cache_clear()`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from sddx.data.encode import render, token_ids
from sddx.data.selfdata import TOO_LONG, Answer, answer_of, end_ids
from sddx.engines import writing_worker
from sddx.engines.settings import Settings, failed
from sddx.models.load import context_of, free_memory, text_config
from sddx.records import Count, Natural, NonNegative, PositiveShare, Seed
from sddx.runtime import held

Asked = list[tuple[list[int], dict[str, Any]]]  # prompts as token ids, each with its settings of sampling


@dataclass(frozen=True, kw_only=True)
class Writer(Settings):
    """`write_answers` with vLLM: the settings of `generation=vllm`, whose engines share the rows. It reads the
    model from its folder, so that none of ours need be in memory.

    Greedy where `temperature` is 0, otherwise sampled by vLLM with a seed for each row that
    hangs on (`seed`, its prompt) only; the samples are not those of the Hugging Face writer, and on a GPU the
    batch may change what is nearly a tie.
    """

    max_new_tokens: Count
    temperature: NonNegative
    top_p: PositiveShare
    top_k: Natural
    seed: Seed
    dtype: str

    def require(self) -> None:
        """Raises UserError where vLLM is not there, or not GPUs enough."""
        self.require_packages("vllm", group="generation", instead="generation=greedy")

    def about(self, folder: Path) -> dict[str, str]:
        """Who writes: the backend and its version, from the engines themselves."""
        return {"backend": "vllm", "version": engines(folder, self)[0].version}

    def __call__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        progress: Callable[[int], object] = lambda rows: None,
    ) -> list[Answer]:
        """The model's answer to each prompt, in order, by the rules of `selfdata.write_answers`: what ends an
        answer, and which carry a fault. Raises UserError where an engine fails, with the end of its log."""
        texts = [render(tokenizer, prompt) for prompt in prompts]
        tokens = token_ids(tokenizer, texts)
        context = context_of(text_config(folder))
        room = min(filter(None, (context, self.max_model_len)), default=float("inf"))
        fitting = [row for row in range(len(prompts)) if len(tokens[row]) + self.max_new_tokens <= room]
        answers = [Answer("", TOO_LONG)] * len(prompts)
        progress(len(prompts) - len(fitting))
        ends = _ends(folder, tokenizer)
        asked = [(tokens[row], self._sampling(texts[row], ends)) for row in fitting]
        for row, (ids, reason) in zip(fitting, self._written(folder, asked, progress), strict=True):
            # An engine may leave out the end token that it stopped at.
            answers[row] = answer_of(tokenizer, ids + ends[:1] if reason == "stop" else ids, ends)
        return answers

    def _written(self, folder: Path, asked: Asked, progress: Callable[[int], object]) -> list[Any]:
        """For each request its (token ids, finish reason), from engines that share them."""
        try:
            running = engines(folder, self)
            shares = [asked[place :: len(running)] for place in range(len(running))]
            for engine, share in zip(running, shares, strict=True):
                engine.ask(share)
            written: list[Any] = [None] * len(asked)
            for place, engine in enumerate(running):
                written[place :: len(running)] = answered = engine.answer()["answers"]
                progress(len(answered))
            return written
        except BaseException:
            engines.cache_clear()  # one that failed, or still holds an answer, is of no use to the next rows
            raise

    def _sampling(self, text: str, ends: list[int]) -> dict[str, Any]:
        return {
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or -1,
            "seed": random.Random(f"{self.seed}/{text}").getrandbits(31),
            "stop_token_ids": ends,
            "detokenize": False,
        }

    def engine(self, folder: Path) -> dict[str, Any]:
        """What vLLM's engine is made with. `generation_config=vllm`: the model's own settings (penalties,
        temperature) are not used."""
        return {
            "model": str(folder),
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "max_model_len": self.max_model_len,
            "seed": self.seed,
            "generation_config": "vllm",
        }


@lru_cache(maxsize=1)
def engines(folder: Path, writer: Writer) -> list[Engine]:
    """The running engines for a model; `engines.cache_clear()` ends them and frees their GPUs. What we hold on the
    GPU is freed first."""
    free_memory()
    return [Engine(folder, writer, place) for place in range(writer.data_parallel)]


held(lambda: engines.cache_clear())


class Engine:
    """A worker process with a vLLM engine. It ends when nothing refers to it any more, and with this process."""

    def __init__(self, folder: Path, writer: Writer, place: int) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", prefix="sddx-vllm-", suffix=".log", delete=False)
        self._process = subprocess.Popen(
            [writer.python or sys.executable, "-P", writing_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(writer, place),
        )
        weakref.finalize(self, _end, self._process, self._log)
        self._say(writer.engine(folder))
        self.version: str = self.answer()["version"]

    def ask(self, asked: Asked) -> None:
        """Send requests, whose answer `answer` waits for."""
        self._say({"prompts": [ids for ids, _ in asked], "sampling": [settings for _, settings in asked]})

    def _say(self, fields: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(fields) + "\n")
            self._process.stdin.flush()
        except OSError:
            self._failed()

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises UserError where the engine has ended instead."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline() or self._failed())

    def _failed(self) -> NoReturn:
        raise failed(self._process.wait(), self._log.name)


def _end(process: subprocess.Popen, log: Any) -> None:
    """Let the worker end, as it does when nothing more is to come; the log of one that ended well is not kept."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(OSError):
        process.stdin.close()
    try:
        status = process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    process.stdout.close()
    log.close()
    if status == 0:
        Path(log.name).unlink(missing_ok=True)


def _environment(writer: Writer, place: int) -> dict[str, str]:
    """The worker's environment: where engines share the rows, each sees GPUs of its own."""
    if writer.data_parallel == 1:
        return dict(os.environ)
    each, visible = writer.tensor_parallel, os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = visible.split(",") if visible else [str(gpu) for gpu in range(each * writer.data_parallel)]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(seen[place * each : (place + 1) * each])}


def _ends(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer, as `write_answers` knows them."""
    with_own = (folder / "generation_config.json").is_file()
    config = GenerationConfig.from_pretrained(folder) if with_own else AutoConfig.from_pretrained(folder)
    return end_ids(SimpleNamespace(generation_config=config), tokenizer)
