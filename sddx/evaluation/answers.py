"""Answers of a model that lie on disk, so that an evaluation that was interrupted goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM, CachingLM

from sddx.files.lines import lines
from sddx.parallel.distributed import agreed, rank


class Answers(dict):
    """By the digest of a request its answer: what `path`, JSON lines, holds already, and what is added from here
    on, line by line. In a group of processes all know what the first has on disk, so that they make the same
    passes, and it alone writes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(agreed(_whole_lines(path)))
        self._file = path.open("a", encoding="utf-8") if rank() == 0 else None
        if self._file:
            self._file.write("\n")  # a line that a crash cut short ends here

    def __setitem__(self, request: str, answer: Any) -> None:
        if request in self:
            return
        super().__setitem__(request, answer)
        if self._file:
            self._file.write(json.dumps([request, answer]) + "\n")
            self._file.flush()

    def commit(self) -> None:
        """lm-eval asks for it; every answer is written as it comes."""


class Resumed(CachingLM):
    """lm-eval's wrapper of a model that asks only for what is not answered yet, over `Answers`. What is sampled is
    written there too, and never read: it is asked for each time."""

    def __init__(self, lm: LM, path: Path) -> None:
        self.lm, self.cache_db, self.dbdict = lm, path, Answers(path)
        lm.set_cache_hook(self.get_cache_hook())


def _whole_lines(path: Path) -> dict[str, Any]:
    """The answers in a file, without a line that a crash cut short. Pairs are tuples, as lm-eval gives them."""
    answers = {}
    for line in lines(path) if path.exists() else []:
        try:
            request, answer = json.loads(line)
        except ValueError:
            continue
        answers[request] = tuple(answer) if isinstance(answer, list) else answer
    return answers
