"""shares: how much of either student each block of a merge takes, chosen by what candidates score."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sddx.compression.kinds import read
from sddx.compression.remove import cut_of
from sddx.config.build import build
from sddx.evaluation.recovery import average
from sddx.evaluation.task_files import placed
from sddx.merging.search import Shares, Trials, plain_shares, with_shares
from sddx.models.load import free_memory, frozen_model, load_tokenizer
from sddx.parallel.launch import sharded
from sddx.records import SHARES_FILE, Artifact
from sddx.runtime import Runtime
from sddx.stages.merge.whole import merge_into, whole
from sddx.store import RESUME, keep_rows
from sddx.store.manifest import replace_text

JUDGED = Path(RESUME, "judged.json")


def shares(
    out: Path,
    *,
    base: Artifact,
    students: Sequence[Artifact],
    files: Sequence[Artifact],
    runtime: Runtime,
    method: dict[str, Any],
    search: dict[str, Any],
    evaluation: dict[str, Any],
    dtype: str,
    attention: str,
    **compressions: Artifact | None,
) -> None:
    """Writes `shares.json`, the shares of the second student by block that score highest, the plain merge's (by the
    settings of `method`) where none scores higher; and `search.json`: those, their score and the plain merge's, and
    every candidate that was judged.

    A score is the macro average of `evaluation`, whose items are for choosing; `files` are those that it reads.
    What was judged when the stage is interrupted is in `out/resume`, and not judged again.
    """
    keep_rows(out, 0)
    done, loading = read(compressions), {"dtype": dtype, "attention": attention}
    plain, look = plain_shares(method, len(cut_of(done).kept)), build(search)
    with (
        whole(out, base, students, done, **loading, device=runtime.roomy) as folders,
        runtime.progress(total=1 + look.most, what="judging merges", unit="model") as bar,
    ):
        judge = Judge(out, folders, method, placed(evaluation, files), loading, runtime, bar.update)
        trials = Trials(judge, judge.known)
        trials(plain)
        look(trials, plain)
    record = {"shares": trials.best, "score": trials.scores[trials.best], "plain": trials.scores[plain]}
    record |= {"candidates": [{"shares": each, "score": score} for each, score in trials.scores.items()]}
    (out / SHARES_FILE).write_text(json.dumps(trials.best) + "\n", encoding="utf-8")
    (out / "search.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    runtime.log({"shares/score": record["score"], "shares/plain": record["plain"]})


@dataclass(frozen=True)
class Judge:
    """What a candidate scores, as a model on disk for so long; kept in `out` in case the stage is interrupted."""

    out: Path
    folders: Sequence[Path]
    method: dict[str, Any]
    evaluation: dict[str, Any]
    loading: dict[str, str]
    runtime: Runtime
    tick: Callable[[int], Any]

    @cached_property
    def known(self) -> dict[Shares, float]:
        """What was judged, by an earlier attempt too."""
        file = self.out / JUDGED
        records = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        return {tuple(shares): score for shares, score in records}

    def __call__(self, candidate: Shares) -> float:
        with TemporaryDirectory(dir=self.out) as name:
            merge_into(Path(name), self.folders, build(with_shares(self.method, candidate)))
            score = _score(Path(name), self.evaluation, self.loading, runtime=self.runtime)
        self.known[candidate] = score
        (self.out / JUDGED).parent.mkdir(exist_ok=True)
        replace_text(self.out / JUDGED, json.dumps(list(self.known.items())))
        self.tick(1)
        return score


@sharded
def _score(folder: Path, evaluation: dict[str, Any], loading: dict[str, str], *, runtime: Runtime) -> float:
    model = frozen_model(folder, **loading, device=runtime.device)
    results = build(evaluation)(model, load_tokenizer(folder), replace(runtime, quiet=True))
    free_memory()
    return average(results["tasks"])
