"""distill: the unpruned model writes its own answer to every prompt of one shard."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

import transformers

from sddx.config.build import build
from sddx.data.selfdata import Answer, strangers
from sddx.data.shards import read_examples, write_rows
from sddx.data.templates import rewriting_prompt
from sddx.models.load import frozen_model, load_tokenizer
from sddx.parallel.launch import sharded
from sddx.records import ANSWERS_FILE, Artifact
from sddx.runtime import Runtime


def distill(
    out: Path,
    *,
    base: Artifact,
    shard: Artifact,
    runtime: Runtime,
    guided: bool,
    rewrite: str,
    generation: dict[str, Any],
    dtype: str,
    attention: str,
    reference: Literal["right", "wrong"] = "right",
) -> None:
    """Writes `answers.jsonl`: the model's answer to each row, and what is wrong with its form, if anything is; and
    `generation.json`: the backend that wrote, and its version.

    `guided` shows the reference in the rewriting template (self-data distillation, after SDFT, arXiv
    2402.13669); without it the model sees the prompt alone (the control `sdd_plain`). Shown is the row's own
    reference, or where `reference` is wrong, another row's, drawn by the generation's seed.
    """
    examples = read_examples(shard.path)
    shown = [example.response for example in examples]
    if guided and reference == "wrong":
        shown = strangers(examples, generation["seed"])
    prompts = [
        rewriting_prompt(rewrite, example.prompt, answer) if guided else example.prompt
        for example, answer in zip(examples, shown, strict=True)
    ]
    write = build(generation)
    # One that can say who writes reads the model from its folder itself: ours stays out of memory.
    if hasattr(write, "about"):
        about = write.about(base.path)
        answers = write(base.path, load_tokenizer(base.path), prompts, partial(_progress, runtime))
    else:
        about = {"backend": "transformers", "version": transformers.__version__}
        loading = {"dtype": dtype, "attention": attention}
        answers = _answers(base.path, prompts, generation, loading, runtime=runtime)
    (out / "generation.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    write_rows(answers, out / ANSWERS_FILE)


@sharded
def _answers(
    folder: Path, prompts: list[str], generation: dict[str, Any], loading: dict[str, str], *, runtime: Runtime
) -> list[Answer]:
    teacher = frozen_model(folder, **loading, device=runtime.device)
    return build(generation)(teacher, load_tokenizer(folder), prompts, partial(_progress, runtime))


def _progress(runtime: Runtime, rows: int) -> None:
    runtime.log({"distill/written": rows})
