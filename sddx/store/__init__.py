"""The store: what a stage made, kept under a key of all that could change it.

Layout: `root/<stage>/<settings>/<key>/`, where artifacts that differ in their sources alone lie side by side.
A stage is built in `<key>.partial` under the lock `<key>.lock`, which ends with the process that holds it.
In its folder a stage leaves these names to the store: `manifest.json`, `metrics.jsonl` and, for what it needs
to resume after a crash and for nothing else, the subfolder `resume/`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import platformdirs

from sddx.errors import UserError
from sddx.files import lock
from sddx.records import Artifact
from sddx.runtime import Runtime
from sddx.store import digest, manifest, measure, sources

RESUME, SECONDS = "resume", "seconds"  # what a stage resumes from, and how long it took until then
ROWS = "metrics.jsonl"
Stage = Callable[..., Any]
Inputs = dict[str, Artifact | list[Artifact] | None]
log = logging.getLogger(__name__)


def default_root() -> Path:
    """The folder named by SDDX_STORE, else `sddx` in the user's cache folder."""
    return Path(os.environ.get("SDDX_STORE") or platformdirs.user_cache_path("sddx"))


class Store:
    """Artifacts under `root`. Stages named in `accept` go on with an artifact of older source where only
    source differs; `accepted` lists each such use as {stage, key, changed: the source files that differ}."""

    def __init__(self, root: Path, accept: Collection[str] = ()) -> None:
        """Raises UserError where `root` cannot be written."""
        self.root = Path(root).expanduser().absolute()
        self.accept = set(accept)
        self.accepted: list[dict[str, Any]] = []
        _check_writable(self.root)
        sources.read_package()

    def build(self, stage: Stage, inputs: Inputs, /, *, runtime: Runtime, **spec: Any) -> Artifact:
        """The artifact of `stage(out, **inputs, runtime=runtime, **spec)`, made only where the store lacks it.

        `spec`, the inputs' names and their keys are hashed, `runtime` is not; an input that is None is none. The
        rows that the stage logs belong to the artifact and are logged again when it is found. An exception of the
        stage is passed on, and what it left in `resume/` is there when the same stage is built again. Raises
        TypeError where a value of `spec` is not plain JSON.
        """
        recipe = digest.recipe(stage, inputs, spec)
        artifact, present = self._find(recipe)
        if present:
            return _hit(artifact, runtime)
        artifact.path.parent.mkdir(parents=True, exist_ok=True)
        with lock.hold(Path(f"{artifact.path}.lock"), waiting=_waiting(artifact)) as require_held:
            if _sound(artifact.path):
                return _hit(artifact, runtime)
            self._explain(recipe, artifact)
            out, seconds = _make(stage, inputs, artifact, recipe, runtime, spec)
            require_held()
            manifest.write(out, _description(recipe, runtime, seconds))
            if artifact.path.exists():
                manifest.remove(artifact.path)
            out.rename(artifact.path)
        return artifact

    def _find(self, recipe: digest.Recipe) -> tuple[Artifact, bool]:
        artifact = Artifact(recipe.stage, recipe.key, self._folder(recipe) / recipe.key)
        if _sound(artifact.path):
            return artifact, True
        old = self._old(recipe)
        return (old, True) if old else (artifact, False)

    def source(self, name: str, path: Path, counts: Callable[[str], bool] = bool) -> Artifact:
        """A file, or a folder with its visible files, as an artifact that is used where it lies.

        Its key is a hash of the content: the bytes and, in a folder, the relative names; of those alone for which
        `counts(relative name)` holds. Raises UserError where there is no such file.
        """
        path = Path(path).expanduser().absolute()
        files = _visible_files(path, counts)
        if not files:
            raise UserError(f"{name}: there is no file at {path}; give a file, or a folder with files in it")
        memory = self.root / ".sources" / f"{digest.digest(str(path))}.json"
        known = _remembered(memory)
        records = {at: digest.record(file, known.get(at)) for at, file in files.items()}
        if records != known:
            memory.parent.mkdir(exist_ok=True)
            manifest.replace_text(memory, json.dumps(records))
        return Artifact(name, digest.digest({at: entry["sha256"] for at, entry in records.items()}), path)

    def remembered(self, hangs_on: list[Any], find: Callable[[], str]) -> str:
        """The text that `find` gives, found once for all that it `hangs_on` (plain values)."""
        memory = self.root / ".sources" / f"{digest.digest(hangs_on)}.txt"
        with suppress(OSError):
            if text := memory.read_text(encoding="utf-8"):  # none where the power failed while it was written
                return text
        memory.parent.mkdir(exist_ok=True)
        manifest.replace_text(memory, text := find())
        return text

    def by_content(self, artifact: Artifact, file: str) -> Artifact:
        """An artifact under a key of what one of its files holds: whatever led there, what is built on it is the
        same, and built once."""
        return self.source(artifact.stage, artifact.path, lambda name: name == file)

    def _folder(self, recipe: digest.Recipe) -> Path:
        return self.root / recipe.stage / recipe.settings[:16]

    def _older(self, recipe: digest.Recipe) -> list[tuple[Path, dict[str, Any]]]:
        """The artifacts that differ from the recipe in their sources alone, newest first."""
        folders = [path for path in self._folder(recipe).glob("*") if not path.suffix]
        others = [path for path in folders if path.name != recipe.key]
        return sorted(manifest.artifacts(others), key=lambda pair: pair[1]["created"], reverse=True)

    def _old(self, recipe: digest.Recipe) -> Artifact | None:
        """The newest sound artifact of older source, where the user accepts it for this stage."""
        if recipe.stage not in self.accept:
            return None
        for path, fields in self._older(recipe):
            if _sound(path):
                changed = _differing(fields["sources"], recipe.sources)
                self.accepted.append({"stage": recipe.stage, "key": path.name, "changed": changed})
                log.warning("accepting an old %s: %s changed since", recipe.stage, ", ".join(changed))
                return Artifact(recipe.stage, path.name, path)
        return None

    def _explain(self, recipe: digest.Recipe, artifact: Artifact) -> None:
        """Says what is wrong with an artifact that is there, or which source moved its key."""
        if artifact.path.exists():
            wrong = manifest.damage(artifact.path, manifest.read(artifact.path))
            log.warning("damaged artifact, rebuilding %s %s: %s", recipe.stage, recipe.key, "; ".join(wrong))
        elif older := self._older(recipe):
            changed = _differing(older[0][1]["sources"], recipe.sources)
            log.info("rebuilding %s: %s changed", recipe.stage, ", ".join(changed))


def keep_rows(out: Path, before_step: int) -> list[dict[str, Any]]:
    """The rows that a stage in `out` logged before `before_step` in an earlier, interrupted attempt.

    For a stage that resumes, or starts afresh although `resume/` is there (`before_step=0`): it logs them
    again before it goes on, since the file of rows is emptied here. Rows without a step are left out, because
    the stage logs them anew. Without an earlier attempt there are none.
    """
    path = out / ROWS
    rows = _rows(path) if path.exists() else []
    path.unlink(missing_ok=True)
    return [row for row in rows if row.get("step", before_step) < before_step]


def _check_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UserError(
            f"the store cannot be written: {root} ({error.strerror}); "
            "give another folder with store=/path/to/folder or the environment variable SDDX_STORE"
        ) from error


def _sound(folder: Path) -> bool:
    """Whether an artifact is complete. Raises UserError where that cannot be known: nothing is built over one that
    may be sound."""
    try:
        return (folder / manifest.NAME).exists() and not manifest.damage(folder, manifest.read(folder))
    except UserError as error:
        raise UserError(f"{error} Make it readable, or remove {folder} to build it again.") from None


def _hit(artifact: Artifact, runtime: Runtime) -> Artifact:
    """Logs the artifact's rows again and marks it as used now."""
    for row in _rows(artifact.path / ROWS) if (artifact.path / ROWS).exists() else []:
        runtime.log(row)
    with suppress(OSError):  # in a shared store it may be another user's
        os.utime(artifact.path / manifest.NAME)
    return artifact


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without a last one that a crash cut short."""
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.split("\n") if line]


def _waiting(artifact: Artifact) -> Callable[[], None]:
    return lambda: log.warning("waiting for another process that builds %s %s", artifact.stage, artifact.key[:12])


def _make(
    stage: Stage,
    inputs: Inputs,
    artifact: Artifact,
    recipe: digest.Recipe,
    runtime: Runtime,
    spec: dict[str, Any],
) -> tuple[Path, float]:
    """Runs the stage in the partial folder: that, and the seconds that it took, of all attempts that it went on
    from."""
    out = _cleared(artifact)
    import_module(stage.__module__)  # before what is loaded is noted
    modules = list(sys.modules.values())
    loaded = [file for module in modules if (file := getattr(module, "__file__", None))]
    measure.reset_peak_memory(runtime.device)
    with _timed(out / RESUME / SECONDS) as watch:
        stage(out, **inputs, runtime=replace(runtime, log=_recorder(out / ROWS, runtime.log)), **spec)
    _refuse_edits(recipe, loaded)
    shutil.rmtree(out / RESUME, ignore_errors=True)
    return out, watch()


@contextmanager
def _timed(saved: Path) -> Iterator[Callable[[], float]]:
    """The seconds of the body and of those before it that were `saved`; they are saved where there is something to
    resume from."""
    before, start = 0.0, time.perf_counter()
    with suppress(OSError, ValueError):
        before = float(saved.read_text(encoding="utf-8"))
    ended: list[float] = []
    try:
        yield lambda: ended[0]
    finally:
        ended.append(before + time.perf_counter() - start)
        if saved.parent.is_dir():
            saved.write_text(str(ended[0]), encoding="utf-8")


def _cleared(artifact: Artifact) -> Path:
    """The partial folder, emptied; where an earlier attempt left `resume/`, that and the rows stay."""
    out = artifact.path.with_name(artifact.key + ".partial")
    out.mkdir(exist_ok=True)
    stays = {RESUME, ROWS} if (out / RESUME).exists() else set()
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink() and path.name not in stays:
            shutil.rmtree(path)
        elif path.name not in stays:
            path.unlink()
    return out


def _recorder(path: Path, forward: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """Appends each row to the file before it hands it on, so that no crash loses a row that was seen."""

    def record(row: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        forward(row)

    return record


def _refuse_edits(recipe: digest.Recipe, loaded: list[str]) -> None:
    """Raises UserError where source was edited since it was hashed and its file was not in `loaded` before the
    stage ran: the stage may have loaded either version. Of what was loaded, the hashed version ran."""
    edited = sources.changed(recipe.source.definitions)
    before = {os.path.realpath(file) for file in loaded} if edited else set()
    if late := sorted({one.module.file for one in edited if str(one.module.path) not in before}):
        raise UserError(
            f"{', '.join(late)} was edited while this process ran, so which version the stage {recipe.stage} "
            "used is not known and its result was not kept; run the command again"
        )


def _description(recipe: digest.Recipe, runtime: Runtime, seconds: float) -> dict[str, Any]:
    """The manifest without its files."""
    return {
        **recipe.described,
        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
        "seconds": round(seconds, 3),
        "peak_memory": measure.peak_memory(runtime.device),
        "device": runtime.device,
        "threads": measure.threads(),
        "seed": recipe.spec.get("seed"),
        "versions": measure.versions(),
        "commit": measure.commit(),
    }


def _differing(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _visible_files(path: Path, counts: Callable[[str], bool]) -> dict[str, Path]:
    """The files of a folder that count, by relative name, without hidden ones (`.git`, `.cache`) and what Python
    leaves beside code that it ran; or a single file."""
    if path.is_file():
        return {"": path}
    inside = [(file.relative_to(path), file) for file in sorted(path.rglob("*")) if file.is_file()]
    hidden = {at for at, _ in inside if any(part.startswith(".") or part == "__pycache__" for part in at.parts)}
    return {at.as_posix(): file for at, file in inside if at not in hidden and counts(at.as_posix())}


def _remembered(path: Path) -> dict[str, Any]:
    """The records of an earlier look at a source; empty where there is none that can be read."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}
