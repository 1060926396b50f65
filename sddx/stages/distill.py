"""distill: the unpruned model writes its own answer to every prompt of one shard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from sddx.build import build
from sddx.data.selfdata import acceptance, judge
from sddx.data.shards import read_examples, write_rows
from sddx.data.templates import rewriting_prompt
from sddx.models.load import frozen_model, load_tokenizer
from sddx.records import Artifact
from sddx.runtime import Runtime


def distill(
    out: Path,
    model: Artifact,
    shard: Artifact,
    *,
    runtime: Runtime,
    guided: bool,
    rewrite: str,
    check: dict[str, Any],
    generation: dict[str, Any],
    dtype: str,
    attention: str,
) -> None:
    """Writes `rewrites.jsonl`: prompt, reference, the model's answer, and why it was refused, if it was; and
    `generation.json`: the backend that wrote, and its version.

    `guided` shows the reference in the rewriting template (self-data distillation, SDFT; facts A5); without
    it the model sees the prompt alone (the control `sdd_plain`).
    """
    examples = read_examples(shard.path)
    prompts = [
        rewriting_prompt(rewrite, example.prompt, example.response) if guided else example.prompt
        for example in examples
    ]
    write = build(generation)
    # One that can say who writes reads the model from its folder itself: ours stays out of memory.
    own = hasattr(write, "about")
    teacher = model.path if own else frozen_model(model.path, dtype, attention, runtime.device)
    about = write.about(model.path) if own else {"backend": "transformers", "version": transformers.__version__}
    answers = write(
        teacher, load_tokenizer(model.path), prompts, lambda rows: runtime.log({"distill/written": rows})
    )
    (out / "generation.json").write_text(json.dumps(about) + "\n")
    rewrites = judge(examples, answers, check=build(check))
    write_rows(rewrites, out / "rewrites.jsonl")
    runtime.log({"distill/accepted": acceptance(rewrites)["accepted"]})
