"""The process in which vLLM evaluates a model: `python -P judging_worker.py REQUEST ANSWER`, two JSON files.

The request holds `model` (what lm-eval's VLLM is made with), `evaluation` (the settings of `harness.evaluate`) and
`answered` (a file that it goes on from);
the answer is {results: what that returns}, or {mistake: what a UserError says}. Another Python that runs this needs
vllm, lm_eval and scipy.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Thread
from typing import Any


def judge(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    from lm_eval.models.vllm_causallms import VLLM

    from sddx.errors import UserError
    from sddx.evaluation.harness import evaluate
    from sddx.evaluation.prompts import SameTokens
    from sddx.runtime import Runtime

    class SameTokensVLLM(SameTokens, VLLM):
        pass

    reads = SameTokensVLLM if request["evaluation"].get("encoding", "same") == "same" else VLLM
    lm = reads(**request["model"])
    try:
        answered = Path(request["answered"])
        return {"results": evaluate(lm, lm.tokenizer, Runtime(), answered, **request["evaluation"])}
    except UserError as error:
        return {"mistake": list(error.args)}


def use_this_sddx() -> None:
    """Import `sddx` from the folder of this file, whatever another Python has under that name, and nothing else
    that lies beside it."""
    folder = Path(__file__).resolve().parents[1]
    spec = spec_from_file_location("sddx", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    sys.modules["sddx"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["sddx"])


def end_with_parent() -> None:
    """End this process and those of vLLM when the one that started it is gone: nobody would collect the answer,
    and the GPU would stay taken."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is ever written
        os.killpg(0, signal.SIGKILL)

    Thread(target=wait, daemon=True).start()


if __name__ == "__main__":  # vLLM's own processes read this file too
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sddx").setLevel(logging.INFO)
    end_with_parent()
    use_this_sddx()
    _request, _answer = map(Path, sys.argv[1:])
    _answer.write_text(json.dumps(judge(json.loads(_request.read_text(encoding="utf-8")))), encoding="utf-8")
