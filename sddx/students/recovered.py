"""What a finished run left on disk, found again from its summary."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sddx.compression.compressed import Compressed, Compression
from sddx.compression.kinds import read
from sddx.compression.remove import cut_of
from sddx.errors import UserError
from sddx.records import Cut
from sddx.run_folder import SUMMARY, Kept, folder_of, read_summary
from sddx.store import manifest
from sddx.students.student import load_student

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovered:
    """A run's summary with the folders of its base model and its student (None: there is none), and what was done
    to the model."""

    folder: Path
    summary: dict[str, Any]
    base: Path
    done: tuple[Compression, ...]
    trained: Path | None

    @property
    def cut(self) -> Cut:
        """Which blocks are left."""
        return cut_of(self.done)

    def loading(self, dtype: str | None = None, device: str = "cpu") -> dict[str, str]:
        """How its models are loaded: in the run's dtype, unless another is given, and with its attention."""
        return {
            "dtype": dtype or self.summary["dtype"],
            "attention": self.summary["attention"],
            "device": device,
        }

    def student(self, dtype: str | None = None, device: str = "cpu") -> Compressed:
        """The recovered model, in eval mode and frozen."""
        key = self.summary["artifacts"]["model"]
        return load_student(self.base, self.trained, done=self.done, base=key, **self.loading(dtype, device))

    @property
    def judged(self) -> str:
        """The name that the run's evaluations have for it: without training, what is left is the pruned model."""
        return "recovered" if self.trained else "pruned"

    def artifact(self, stage: str) -> Path | None:
        """The folder of one of the run's artifacts; None where the store no longer has it."""
        key = self.summary["artifacts"].get(stage)
        kept = stage.partition("_")[0]  # evaluations are named after the model that they evaluate
        return manifest.find(Path(self.summary["store"]), kept, key) if isinstance(key, str) else None


def find_own(path: str | Path) -> Recovered:
    """As `find_run`, for who takes its student: where the run merged students, what that became is named."""
    run = find_run(path)
    if merged := run.artifact("merge"):
        log.warning("%s: taken is the run's own student; what it merged is a model of its own, %s.", path, merged)
    return run


def find_run(path: str | Path) -> Recovered:
    """The run of a `summary.json`, or of the folder that holds it.

    Raises UserError where there is none, and where the store that the run wrote to, or the base model, is gone.
    """
    file = folder_of(path) / SUMMARY
    try:
        fields = read_summary(file, Kept)
    except UserError as error:
        raise UserError(
            f"{error} Give the summary.json that the last line of sddx.train names, or its folder."
        ) from None
    keys, base, store = fields["artifacts"], Path(fields["model_path"]), Path(fields["store"])
    folders: dict[str, Path] = {}
    for stage in (stage for stage in ("prune", "patch", "train") if stage in keys):
        place = manifest.find(store, stage, keys[stage])
        if place is None or not base.is_dir():
            gone = base if place else f"{stage} {keys[stage]} in the store {store}"
            raise UserError(f"{gone} is gone or damaged. Run the same command again to rebuild it.")
        folders[stage] = place
    done = read({"cut": folders["prune"], "patch": folders.get("patch")})
    return Recovered(file.parent, fields, base, done, folders.get("train"))
