"""The process in which vLLM runs. Needs vLLM and nothing of ours, so that another Python can run it.

Reads one JSON object a line and answers each with one: first the engine's settings, answered with vLLM's version;
then requests {prompts: lists of token ids, sampling: one object of settings for each}, answered with
{answers: [[token ids, finish reason], ..]}. Ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    import vllm

    engine = vllm.LLM(**json.loads(requests.readline()))
    _answer(answers, {"version": vllm.__version__})
    for line in requests:
        request = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        sampling = [vllm.SamplingParams(**settings) for settings in request["sampling"]]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        written: list[Any] = [output.outputs[0] for output in outputs]
        _answer(answers, {"answers": [[list(one.token_ids), one.finish_reason] for one in written]})


def _answer(answers: TextIO, fields: dict[str, Any]) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


if __name__ == "__main__":
    # vLLM prints where it likes: what it says goes to the error output, and the answers to where output was.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, channel)
