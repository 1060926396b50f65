"""select: which of the unpruned model's answers to one shard may be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sddx.config.build import build
from sddx.data.selfdata import Answer, acceptance, judge
from sddx.data.shards import read_examples, read_rows, write_rows
from sddx.records import ANSWERS_FILE, REWRITES_FILE, Artifact
from sddx.runtime import Runtime


def select(
    out: Path,
    *,
    shard: Artifact,
    answers: Artifact,
    runtime: Runtime,
    check: dict[str, Any],
    template: str | None = None,
) -> None:
    """Writes `rewrites.jsonl`: prompt, reference, the model's answer, and why it was refused, if it was. `template`
    names the one that showed the model the references (None: it saw none).

    A stage of its own, since writing is dear and checking is not: another check reads the same answers.
    """
    written = read_rows(Answer, answers.path / ANSWERS_FILE)
    rewrites = judge(read_examples(shard.path), written, check=build(check), template=template)
    write_rows(rewrites, out / REWRITES_FILE)
    runtime.log({"select/accepted": acceptance(rewrites)["accepted"]})
