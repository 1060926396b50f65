"""draft: what a pruned or recovered model is worth as a draft for the unpruned one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sddx.compression.kinds import read
from sddx.config.build import build
from sddx.data.encode import prompts_of
from sddx.data.selfdata import end_ids
from sddx.data.shards import read_examples
from sddx.models.load import load_tokenizer
from sddx.records import Artifact
from sddx.runtime import Runtime
from sddx.students.teacher import both


def draft(
    out: Path,
    *,
    base: Artifact,
    rows: Artifact,
    student: Artifact | None = None,
    runtime: Runtime,
    speculation: dict[str, Any],
    dtype: str,
    attention: str,
    **compressions: Artifact | None,
) -> None:
    """Writes `draft.json`, what `sddx.speculation.measure.Drafts` finds over the prompts of held-out `rows`.
    The draft is the model after the `compressions`, or the recovered one where there is a `student`; the target
    is the unpruned one, in the same weights unless the draft's are its own. What is timed is of this machine,
    and of no key."""
    loading: dict[str, Any] = {"dtype": dtype, "attention": attention, "device": runtime.device}
    target, drafting = both(base, read(compressions), student, **loading)
    tokenizer, tried = load_tokenizer(base.path), build(speculation)
    prompts = prompts_of(tokenizer, read_examples(rows.path))
    total = len(prompts[: tried.size]) * (2 + len(tried.lookaheads))
    with runtime.progress(total=total, what="drafting", unit="text") as bar:
        measured = tried(target, drafting, prompts, end_ids(target, tokenizer), bar.update)
    (out / "draft.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    for ahead, record in measured["lookaheads"].items():
        runtime.log({f"draft/acceptance_{ahead}": record["acceptance"], f"draft/length_{ahead}": record["length"]})
