"""Laws of the store: what moves a key, what a crash leaves, what a hit gives, what is said."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from composing import SMALL, composed, resolve
from stored import FIELDS
from transformers import LlamaConfig, OPTConfig

from sddx.commands.store import main
from sddx.errors import UserError
from sddx.files import lock
from sddx.models import families
from sddx.pipeline import Run
from sddx.records import Artifact
from sddx.runtime import Runtime
from sddx.stages.evaluate.run import evaluate
from sddx.stages.train.run import train
from sddx.store import Store, default_root, digest, keep_rows, manifest, sources
from sddx.train import method

HARNESS = "sddx.evaluation.harness.evaluate"
VALUES = ["sddx.importance.coalitions.TaskScore", "sddx.importance.coalitions.Loss"]
LABORATORY = {
    "lab/__init__.py": "",
    "lab/stages.py": """
        from lab import near

        def measure(out, *inputs, runtime, value=1, loss=None):
            "Writes a number."
            from .maths import deep
            (out / "result.txt").write_text(str(near.double(value)) + str(deep.ONE))
            runtime.log({"step": value, "loss": 0.5})
            (out.parents[3] / "calls").open("a").write("x")

        def after(out, *, runtime, **inputs):
            (out / "after.txt").write_text("after")
    """,
    "lab/near.py": "def double(x):\n    return 2 * x\n",
    "lab/maths/__init__.py": "",
    "lab/maths/deep.py": "ONE = 1\n",
    "lab/unused.py": "NOTHING = 0\n",
    "plug.py": "import plug_helper\n\ndef term(x):\n    return plug_helper.same(x)\n",
    "plug_helper.py": "def same(x):\n    return x\n",
}


class Laboratory:
    """A small package outside sddx, whose source tests edit; each edit is seen as by a new process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in LABORATORY.items():
            path = folder / "code" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))

    @property
    def stages(self) -> ModuleType:
        return importlib.import_module("lab.stages")

    @property
    def calls(self) -> int:
        path = self.folder / "calls"
        return len(path.read_text()) if path.exists() else 0

    def store(self, **options: Any) -> Store:
        return Store(self.folder / "store", **options)

    def edit(self, name: str, change: Callable[[str], str]) -> None:
        path = self.folder / "code" / name
        path.write_text(change(path.read_text()))
        forget()

    def key(self, **spec: Any) -> str:
        return digest.recipe(self.stages.measure, {}, spec).key


def forget() -> None:
    """What a new process knows of the source."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lab", "plug", "plug_helper")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    sources.forget()


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Laboratory]:
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two edits within a second look alike to the cache
    monkeypatch.setattr(sources, "read_package", lambda: None)  # slow after each edit, and sddx is not edited
    forget()
    yield Laboratory(tmp_path)
    forget()


def run_in_process(lab: Laboratory, code: str, **options: Any) -> subprocess.Popen[str]:
    paths = [str(lab.folder / "code"), str(sources.PACKAGE.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    start = f"""
        import logging
        from pathlib import Path
        from sddx.runtime import Runtime
        from sddx.store import Store
        logging.basicConfig(level=logging.INFO)
        store = Store(Path({str(lab.folder / "store")!r}))
    """
    command = [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code)]
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, **options)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 15
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.01)


# what a build gives


def test_second_build_builds_nothing(lab: Laboratory) -> None:
    """The same call gives the same artifact, and the stage ran once."""
    first = lab.store().build(lab.stages.measure, {}, runtime=Runtime(), value=3)
    second = lab.store().build(lab.stages.measure, {}, runtime=Runtime(), value=3)
    assert first == second and lab.calls == 1
    assert (first.path / "result.txt").read_text() == "61"
    assert first.path.name == first.key and not list(first.path.parent.glob("*.partial"))


def test_manifest_says_how_it_was_made(lab: Laboratory) -> None:
    """The manifest holds the recipe, and facts of the making that no key depends on."""
    store = lab.store()
    base = store.build(lab.stages.measure, {}, runtime=Runtime(), value=3)
    child = store.build(lab.stages.after, {"base": base}, runtime=Runtime())
    fields = manifest.read(base.path)
    assert fields["spec"] == {"value": 3} and fields["key"] == base.key and fields["device"] == "cpu"
    assert set(fields["sources"]) == {"lab/stages.py:measure", "lab/near.py:double", "lab/maths/deep.py:ONE"}
    assert fields["format"] == 1
    assert fields["peak_memory"] > 2**20 and fields["threads"] >= 1 and fields["seconds"] >= 0
    assert fields["versions"]["sddx"] and set(fields["files"]) == {"result.txt", "metrics.jsonl"}
    assert manifest.read(child.path)["inputs"] == [{"name": "base", "stage": "measure", "key": base.key}]


def test_peak_memory_is_that_of_the_stage(lab: Laboratory) -> None:
    """A stage that holds 64 MiB more than the one after it has at least 48 MiB more at its peak. They are pages of
    their own: what is allocated may lie in memory that was freed before and is held all the same."""
    lab.edit(
        "lab/stages.py",
        lambda text: (
            text + "\nimport mmap\n\ndef heavy(out, *, runtime):\n    with mmap.mmap(-1, 2**26) as pages:\n"
            "        for at in range(0, 2**26, mmap.PAGESIZE):\n            pages[at] = 1\n"
            "\ndef light(out, *, runtime):\n    pass\n"
        ),
    )
    store = lab.store()
    peaks = [
        manifest.read(store.build(stage, {}, runtime=Runtime()).path)["peak_memory"]
        for stage in (lab.stages.heavy, lab.stages.light)
    ]
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system cannot count the peak of one stage")
    assert peaks[0] - peaks[1] > 48 * 2**20


def test_rows_are_logged_once_and_replayed_on_a_hit(lab: Laboratory) -> None:
    """A found artifact gives the logger the rows that its making gave."""
    made: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    lab.store().build(lab.stages.measure, {}, runtime=Runtime(log=made.append), value=3)
    lab.store().build(lab.stages.measure, {}, runtime=Runtime(log=found.append), value=3)
    assert made == found == [{"step": 3, "loss": 0.5}]


# what moves a key


def test_runtime_does_not_move_the_key(lab: Laboratory) -> None:
    """What is not hashed finds the same artifact."""
    store = lab.store()
    first = store.build(lab.stages.measure, {}, runtime=Runtime())
    second = store.build(lab.stages.measure, {}, runtime=Runtime(device="cuda", quiet=True))
    assert first.key == second.key


TOLD = """
from typing import Annotated, ClassVar


class Limits:
    lowest: int = 0


def double(x: int) -> int:
    if x < Limits.lowest:
        logger.warning("a negative number")
        raise ValueError(f"no: {x}") from None
    assert x < 100, "too large"
    for _ in runtime.progress([x], what="doubling", unit="number"):
        print("doubled")
    return 2 * x
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("no: {x}", "not {x}, which {told(x)}"),
        ("a negative number", "less than nothing"),
        ("too large", "larger than that"),
        ("doubling", "twice"),
        ('"doubled"', '"again"'),
        ("x: int) -> int", "x: float) -> float"),
        ("lowest: int", "lowest: Annotated[int, 0]"),
        ("\ndef", "\nclass Record:\n    pass\n\ndef told(x):\n    return x\n\ndef"),
        ("\ndef", "\nfrom plug_helper import same\n\ndef"),
    ],
)
def test_what_is_told_does_not_move_the_key(lab: Laboratory, old: str, new: str) -> None:
    """Texts of exceptions and assertions, what is logged and printed, the names of bars, annotations, and
    definitions that nothing speaks of: no number hangs on them."""
    lab.edit("lab/near.py", lambda text: TOLD)
    before = lab.key()
    lab.edit("lab/near.py", methodcaller("replace", old, new))
    assert lab.key() == before
    lab.edit("lab/near.py", methodcaller("replace", "2 * x", "3 * x"))
    assert lab.key() != before


def test_what_makes_a_field_of_a_class_none_moves_the_key(lab: Laboratory) -> None:
    """Of annotations this one counts: a record takes no value for it."""
    lab.edit("lab/near.py", lambda text: TOLD)
    before = lab.key()
    lab.edit("lab/near.py", methodcaller("replace", "lowest: int", "lowest: ClassVar[int]"))
    assert lab.key() != before


def test_a_moved_definition_keeps_the_key(lab: Laboratory) -> None:
    """Where a definition stands does not count: a module under another name, with its old name as an alias or not,
    for what a stage imports and for a `_target_`."""
    by = {target: lab.key(loss={"_target_": target}) for target in ("plug.term", "plug_helper.same")}
    (lab.folder / "code/lab/moved.py").write_text((lab.folder / "code/lab/near.py").read_text())
    (lab.folder / "code/lab/other.py").write_text((lab.folder / "code/plug.py").read_text())
    lab.edit("lab/near.py", lambda text: "from lab.moved import double\n")
    assert lab.key(loss={"_target_": "plug.term"}) == by["plug.term"]
    lab.edit("lab/stages.py", lambda text: text.replace("from lab import near", "from lab import moved as near"))
    (lab.folder / "code/lab/near.py").unlink()
    lab.edit("plug.py", lambda text: "from lab.other import term as term\n")
    assert (
        lab.key(loss={"_target_": "plug.term"}) == lab.key(loss={"_target_": "lab.other.term"}) == by["plug.term"]
    )
    assert by["plug_helper.same"] != by["plug.term"]


def test_targets_count_where_they_stand(lab: Laboratory) -> None:
    """Two functions of one name that change places make another recipe, though they are the same functions."""
    (lab.folder / "code/lab/other.py").write_text("def term(x):\n    return -x\n")
    here, there = {"_target_": "plug.term"}, {"_target_": "lab.other.term"}
    assert lab.key(loss=here, value=there) != lab.key(loss=there, value=here)


@pytest.mark.parametrize("name", ["lab/stages.py", "lab/near.py", "lab/maths/deep.py"])
def test_comments_and_docstrings_do_not_move_the_key(lab: Laboratory, name: str) -> None:
    """Comments, docstrings and blank lines cost nothing, in the stage and in what it imports."""
    before = lab.key()
    lab.edit(name, lambda text: '"""New."""\n# new\n\n' + text.replace("Writes a number.", "It writes."))
    assert lab.key() == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("lab/stages.py", "value=1", "value=2"),
        ("lab/near.py", "2 * x", "3 * x"),  # from a import b
        ("lab/maths/deep.py", "ONE = 1", "ONE = 2"),  # a relative import inside the function
        ("lab/maths/__init__.py", "", "import math\nmath.pi = 3\n"),  # what a package does on the way
    ],
)
def test_edits_move_the_key(lab: Laboratory, name: str, old: str, new: str) -> None:
    """An edit to the code of the stage, or of a module it imports at any depth, moves the key."""
    before = lab.key()
    lab.edit(name, lambda text: text.replace(old, new))
    assert lab.key() != before


def test_from_dot_import_is_followed(lab: Laboratory) -> None:
    """`from . import x` brings the module x."""
    lab.edit("lab/maths/deep.py", lambda text: "from . import wave\nONE = wave.A\n")
    (lab.folder / "code/lab/maths/wave.py").write_text("A = 1\n")
    forget()
    before = lab.key()
    lab.edit("lab/maths/wave.py", lambda text: "A = 2\n")
    assert lab.key() != before


def test_edits_elsewhere_do_not_move_the_key(lab: Laboratory) -> None:
    """A module that the stage does not import does not count."""
    before = lab.key()
    lab.edit("lab/unused.py", lambda text: "NOTHING = 1\n")
    assert lab.key() == before


@pytest.mark.parametrize("name", ["plug.py", "plug_helper.py"])
def test_edited_target_moves_the_key(lab: Laboratory, name: str) -> None:
    """A `_target_` anywhere in the settings counts with its module and with what lies beside it that this
    imports; without the `_target_` the file does not count."""
    spec = {"loss": {"terms": [{"weight": 1.0, "of": {"_target_": "plug.term"}}]}}
    before, without = lab.key(**spec), lab.key()
    lab.edit(name, lambda text: text.replace("(x)", "(y)").replace("return x", "return y"))
    assert lab.key(**spec) != before and lab.key() == without


def test_third_party_target_counts_by_version(lab: Laboratory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `_target_` of an installed distribution moves the key when its version does."""
    spec = {"loss": {"_target_": "filelock.FileLock"}}
    before = lab.key(**spec)
    monkeypatch.setattr(sources, "version", lambda top: "999")
    assert lab.key(**spec) != before


def test_lm_eval_counts_by_version_where_it_is_imported(lab: Laboratory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its releases hold the tasks, so that an upgrade is another evaluation, and nothing else: no training, and no
    score that rests on losses."""
    lab.edit("lab/maths/deep.py", lambda text: text + "\ndef judged():\n    import lm_eval\n    lm_eval.judge()\n")
    before = lab.key()
    lab.edit("lab/maths/deep.py", lambda text: text.replace("ONE = 1", "ONE = lambda: judged()"))
    judged = lab.key()
    monkeypatch.setattr(sources, "version", lambda top: "999")
    assert lab.key() != judged
    lab.edit("lab/maths/deep.py", lambda text: text.replace("ONE = lambda: judged()", "ONE = 1"))
    assert lab.key() == before
    uses = {name: sources.reached(name).packages for name in (HARNESS, *VALUES)}
    assert [bool(packages) for packages in uses.values()] == [True, True, False]
    assert not digest.stage_source(train).packages


def of_sddx() -> dict[str, str]:
    """By stage of sddx what the key of the default job takes from the source."""
    targets = {
        "prepare": ["sddx.tiny.data.dataset"],
        "score": ["sddx.importance.metrics.angular_distance", VALUES[1], "sddx.tiny.data.conversations"],
        "prune": ["sddx.compression.choose.contiguous"],
        "distill": ["sddx.data.selfdata.write_answers"],
        "select": ["sddx.data.checkers.last_number"],
        "train": [
            "sddx.training.objective.Objective",
            "sddx.training.losses.cross_entropy",
            "sddx.training.tuning.lora",
            "sddx.training.fit.Fit",
        ],
        "evaluate": [HARNESS, "sddx.tiny.data.conversations"],
        "report": [],
    }
    modules = {name: importlib.import_module(f"sddx.stages.{name}.run") for name in targets}
    stages = {name: digest.stage_source(vars(module)[name]) for name, module in modules.items()}
    parts = {name: [stages[name], *map(sources.reached, given)] for name, given in targets.items()}
    return {name: digest.digest(digest._summed(sources.together(part))) for name, part in parts.items()}


@pytest.mark.parametrize(
    ("module", "old", "new", "moved"),
    [
        ("sddx.hub", "def asking", "def more():\n    pass\n\n\ndef asking", set()),
        ("sddx.records", "GRANULARITIES =", "class New:\n    pass\n\n\nGRANULARITIES =", set()),
        ("sddx.models.load", "is a folder but holds no config.json", "holds no config.json", set()),
        ("sddx.engines.settings", "vLLM ended", "vLLM stopped", set()),
        ("sddx.engines.writing", '"top_p": self.top_p', '"top_p": 0.5', set()),
        ("sddx.training.losses", "def cross_entropy", "@cache\ndef cross_entropy", {"train"}),
        ("sddx.statistics.intervals", "def standard_error", "@cache\ndef standard_error", {"evaluate", "report"}),
        ("sddx.importance.metrics", "def _angles", "@cache\ndef _angles", {"score"}),
        ("sddx.data.checkers", "rsplit(\"####\", 1)[-1]", "rsplit(\"####\", 2)[-1]", {"select"}),
    ],
)  # fmt: skip
def test_an_edit_of_sddx_moves_what_it_can_change(module: str, old: str, new: str, moved: set[str]) -> None:
    """An error text, a new record, another backend: nothing is built again. A formula: what computes it."""
    sources.forget()
    before = of_sddx()
    sources.forget()
    try:
        source = sources._module(module)
        assert source is not None and old.encode() in source._text
        source._text = source._text.replace(old.encode(), new.encode())
        after = of_sddx()
    finally:
        sources.forget()
    assert {stage for stage in before if before[stage] != after[stage]} == moved


def test_unknown_target_is_a_user_error(lab: Laboratory) -> None:
    """A `_target_` in no module is refused by name."""
    for target in ("no_such_package.term", "sddx_missing.term"):
        with pytest.raises(UserError, match=target):
            lab.key(loss={"_target_": target})


def test_sddx_stages_do_not_count_the_store_or_the_runtime() -> None:
    """What cannot change a number is left out, also for a stage that imports it."""
    files = {one.module.file for one in digest.stage_source(evaluate).definitions}
    assert "sddx/records.py" in files
    assert not [name for name in files if name.startswith(("sddx/store", "sddx/runtime", "sddx/errors"))]


@pytest.mark.parametrize("value", [{1}, Path("x"), float("nan"), {1: 2}, [object()], b"x"])
def test_settings_without_plain_form_are_refused(lab: Laboratory, value: Any) -> None:
    """A value that JSON cannot hold exactly raises a TypeError that names the setting."""
    with pytest.raises(TypeError, match="loss.weight"):
        lab.store().build(lab.stages.measure, {}, runtime=Runtime(), loss={"weight": value})
    assert lab.calls == 0


def test_settings_count_by_value(lab: Laboratory) -> None:
    """Order of names and tuple or list do not count; any value, and the kind of a number, do."""
    assert lab.key(value=1, loss={"a": (1, 2), "b": 3}) == lab.key(loss={"b": 3, "a": [1, 2]}, value=1)
    keys = {lab.key(value=value) for value in (1, 2, 1.5, "1", True, None, [1], {"a": 1})}
    assert len(keys) == 8


def test_keys_chain(lab: Laboratory) -> None:
    """A change upstream moves every key downstream, and which input is which counts."""
    store = lab.store()
    one, two = (store.build(lab.stages.measure, {}, runtime=Runtime(), value=value) for value in (1, 2))
    below = [{"a": one}, {"a": two}, {"b": one}, {"a": one, "b": two}, {"a": two, "b": one}, {"a": [one, two]}]
    keys = {store.build(lab.stages.after, inputs, runtime=Runtime()).key for inputs in below}
    assert len(keys) == len(below)


# edits while a process runs


def test_edit_of_loaded_code_does_not_move_the_key_of_a_running_process(lab: Laboratory) -> None:
    """The key speaks of the code that runs: an edit of a loaded module counts from the next process on."""
    store = lab.store()
    first = store.build(lab.stages.measure, {}, runtime=Runtime())
    (lab.folder / "code/lab/near.py").write_text("def double(x):\n    return 5 * x\n")
    assert store.build(lab.stages.measure, {}, runtime=Runtime()) == first
    store.build(lab.stages.measure, {}, runtime=Runtime(), value=2)
    forget()
    assert store.build(lab.stages.measure, {}, runtime=Runtime()).key != first.key


def test_edit_before_code_is_loaded_is_not_kept(lab: Laboratory) -> None:
    """Where a module is edited after its digest was taken and before it is loaded, nothing is stored."""
    stage = lab.stages.measure
    key = lab.key()
    (lab.folder / "code/lab/maths/deep.py").write_text("ONE = 100\n")
    with pytest.raises(UserError, match="lab/maths/deep.py was edited"):
        lab.store().build(stage, {}, runtime=Runtime())
    assert not list(lab.folder.glob(f"store/*/*/{key}"))


# crashes and races


CRASHING = """
    import time
    def slow(out, *, runtime):
        if (out / "resume" / "step").exists():
            assert not (out / "half").exists()
            (out / "whole").write_text("resumed at " + (out / "resume" / "step").read_text())
            return
        (out / "resume").mkdir()
        (out / "resume" / "step").write_text("7")
        (out / "half").write_text("half")
        runtime.log({"step": 6})
        (out.parents[3] / "ready").touch()
        time.sleep(60)
"""


def test_killed_stage_is_no_hit_and_resumes(lab: Laboratory, caplog: pytest.LogCaptureFixture) -> None:
    """After kill -9 nothing is complete, the lock is free, `resume/` survives and all else is cleared; after
    success `resume/` is gone."""
    lab.edit("lab/stages.py", lambda text: text + textwrap.dedent(CRASHING))
    process = run_in_process(lab, "import lab.stages\nstore.build(lab.stages.slow, {}, runtime=Runtime())")
    wait_for(lab.folder / "ready")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(lab.folder.rglob("manifest.json")) and list(lab.folder.rglob("half"))
    artifact = lab.store().build(lab.stages.slow, {}, runtime=Runtime())
    assert (artifact.path / "whole").read_text() == "resumed at 7"
    assert {path.name for path in artifact.path.iterdir()} == {"manifest.json", "metrics.jsonl", "whole"}
    assert "waiting" not in caplog.text


def test_failed_stage_passes_its_exception_on(lab: Laboratory) -> None:
    """An exception is the caller's, and the next build starts from an empty folder."""
    lab.edit(
        "lab/stages.py",
        lambda text: (
            text
            + textwrap.dedent("""
        def fails(out, *, runtime):
            assert not list(out.iterdir())
            (out / "half").touch()
            raise ArithmeticError("not finite")
    """)
        ),
    )
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="not finite"):
            lab.store().build(lab.stages.fails, {}, runtime=Runtime())
    assert not list(lab.folder.rglob("manifest.json"))


def test_racing_processes_leave_one_artifact(lab: Laboratory) -> None:
    """Of two processes one builds; the other says that it waits and uses the result."""
    lab.edit(
        "lab/stages.py",
        lambda text: (
            text
            + textwrap.dedent("""
        def race(out, *, runtime):
            import time
            (out.parents[3] / "builds").open("a").write("x")
            time.sleep(1.0)
            (out / "result").write_text("done")
    """)
        ),
    )
    code = "import lab.stages\nprint(store.build(lab.stages.race, {}, runtime=Runtime()).path)"
    processes = [run_in_process(lab, code, stdout=subprocess.PIPE) for _ in range(2)]
    answers = [process.communicate(timeout=30) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0][0] == answers[1][0] and (lab.folder / "builds").read_text() == "x"
    assert sum("waiting for another process that builds race" in said for _, said in answers) == 1


def test_keep_rows_cuts_at_the_step(tmp_path: Path) -> None:
    """The rows before the step come back in order; later ones, stepless ones and a torn last line go."""
    rows = [{"step": 0, "a": 1}, {"begin": 1}, {"step": 1, "a": 2}, {"step": 2, "a": 3}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 1, "a')
    assert keep_rows(tmp_path, 2) == [rows[0], rows[2]]
    assert keep_rows(tmp_path, 2) == []


def test_resumed_rows_stand_once(lab: Laboratory) -> None:
    """An interrupted and resumed stage has each row once, in its artifact and in the second run's log."""
    lab.edit(
        "lab/stages.py",
        lambda text: (
            text
            + textwrap.dedent("""
        from sddx.store import keep_rows

        def training(out, *, runtime):
            checkpoint = out / "resume" / "step"
            start = int(checkpoint.read_text()) if checkpoint.exists() else 0
            for row in keep_rows(out, start):
                runtime.log(row)
            for step in range(start, 6):
                if step == 4 and start == 0:
                    raise KeyboardInterrupt
                runtime.log({"step": step})
                (out / "resume").mkdir(exist_ok=True)
                if step == 2:
                    checkpoint.write_text("3")
    """)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        lab.store().build(lab.stages.training, {}, runtime=Runtime())
    logged: list[dict[str, Any]] = []
    artifact = lab.store().build(lab.stages.training, {}, runtime=Runtime(log=logged.append))
    assert logged == [{"step": step} for step in range(6)]
    assert [json.loads(line) for line in (artifact.path / "metrics.jsonl").open()] == logged


# damage


@pytest.mark.parametrize("harm", ["flip", "cut", "delete", "manifest"])
def test_damage_is_said_and_rebuilt(lab: Laboratory, caplog: pytest.LogCaptureFixture, harm: str) -> None:
    """A damaged artifact is named in a warning and made again; the second build gives the right bytes."""
    artifact = lab.store().build(lab.stages.measure, {}, runtime=Runtime(), value=3)
    name = "manifest.json" if harm == "manifest" else "result.txt"
    changes = {"flip": "99", "cut": "6", "manifest": "{"}
    path = artifact.path / name
    path.unlink() if harm == "delete" else path.write_text(changes[harm])
    assert lab.store().build(lab.stages.measure, {}, runtime=Runtime(), value=3) == artifact
    assert (artifact.path / "result.txt").read_text() == "61" and lab.calls == 2
    assert "damaged artifact" in caplog.text and name in caplog.text and artifact.key in caplog.text


def test_large_files_are_trusted_by_size_and_time_but_not_by_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file with its size and time is not read on a hit; a small one is; a full check reads all."""
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 100)
    manifest.write(tmp_path, FIELDS)
    fields = manifest.read(tmp_path)
    time_of_change = path.stat().st_mtime_ns
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(time_of_change, time_of_change))
    assert manifest.damage(tmp_path, fields)
    monkeypatch.setattr(digest, "SMALL", 100)
    assert not manifest.damage(tmp_path, fields)
    assert manifest.damage(tmp_path, fields, full=True) == ["weights has other bytes than were written"]


def test_stage_may_not_write_the_manifest(lab: Laboratory) -> None:
    """A stage's file under a name of the store is refused, not lost."""
    lab.edit(
        "lab/stages.py",
        lambda text: text + "\ndef bad(out, *, runtime):\n    (out / 'manifest.json').touch()\n",
    )
    with pytest.raises(FileExistsError):
        lab.store().build(lab.stages.bad, {}, runtime=Runtime())


# source that changed


def test_changed_source_is_named(lab: Laboratory, caplog: pytest.LogCaptureFixture) -> None:
    """Where only source differs from an older artifact, the run names the files."""
    caplog.set_level(logging.INFO)
    lab.store().build(lab.stages.measure, {}, runtime=Runtime())
    lab.edit("lab/near.py", lambda text: text.replace("2", "3"))
    lab.store().build(lab.stages.measure, {}, runtime=Runtime(), value=8)
    assert "rebuilding" not in caplog.text
    lab.store().build(lab.stages.measure, {}, runtime=Runtime())
    assert "rebuilding measure: lab/near.py:double changed" in caplog.text


def test_accept_goes_on_with_the_newest_old_artifact(lab: Laboratory) -> None:
    """An accepted stage is not rebuilt for its source, only for its settings; each use is noted."""
    for old, factor in ("23", "34", "45"):
        lab.edit("lab/near.py", methodcaller("replace", old, factor))
        newest = lab.store().build(lab.stages.measure, {}, runtime=Runtime())
    lab.edit("lab/near.py", methodcaller("replace", "5", "6"))
    store = lab.store(accept=["measure"])
    assert store.build(lab.stages.measure, {}, runtime=Runtime()) == newest and lab.calls == 3
    assert store.accepted == [{"stage": "measure", "key": newest.key, "changed": ["lab/near.py:double"]}]
    other = store.build(lab.stages.measure, {}, runtime=Runtime(), value=2)
    assert (other.path / "result.txt").read_text() == "121" and len(store.accepted) == 1
    assert lab.store().build(lab.stages.measure, {}, runtime=Runtime()).key != newest.key


# sources by content


def test_source_counts_by_content(lab: Laboratory, tmp_path: Path) -> None:
    """Copies under another name have one key; bytes and relative names move it; hidden files do not."""
    store = lab.store()
    keys = []
    for folder, name, text in (("a", "x", "1"), ("b", "x", "1"), ("c", "x", "2"), ("d", "y", "1")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
        keys.append(store.source("model", tmp_path / folder).key)
    assert keys[0] == keys[1] and len(set(keys)) == 3
    (tmp_path / "a" / ".hidden").write_text("1")
    assert store.source("model", tmp_path / "a") == Artifact("model", keys[0], tmp_path / "a")
    (tmp_path / "a" / "__pycache__").mkdir()
    (tmp_path / "a" / "__pycache__" / "x.pyc").write_bytes(b"left by Python when it ran x")
    assert store.source("model", tmp_path / "a").key == keys[0]
    assert store.source("data", tmp_path / "a" / "x").key == store.source("data", tmp_path / "b" / "x").key


def test_source_sees_an_edit_and_remembers_large_files(
    lab: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edited file moves the key at once; a large one with its size and time is not read again."""
    store, path = lab.store(), tmp_path / "weights"
    path.write_text("a" * 50)
    first = store.source("model", path).key
    time_of_change = path.stat().st_mtime_ns
    path.write_text("b" * 50)
    assert store.source("model", path).key != first
    monkeypatch.setattr(digest, "SMALL", 1)
    second = store.source("model", path).key
    time_of_change = path.stat().st_mtime_ns
    path.write_text("c" * 50)
    os.utime(path, ns=(time_of_change, time_of_change))
    assert store.source("model", path).key == second
    path.write_text("c" * 51)
    assert store.source("model", path).key not in (first, second)


def test_missing_source_is_a_user_error(lab: Laboratory, tmp_path: Path) -> None:
    """Neither a missing path nor an empty folder is a source."""
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        with pytest.raises(UserError, match=name):
            lab.store().source("model", tmp_path / name)


# where it lies


def test_root_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    """Said at once, with the folder and what to do."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="SDDX_STORE"):
        Store(tmp_path / "file")
    with pytest.raises(UserError, match="file/store"):
        Store(tmp_path / "file" / "store")


def test_default_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDDX_STORE wins over the user's cache folder."""
    monkeypatch.setenv("SDDX_STORE", "/scratch/x")
    assert default_root() == Path("/scratch/x")
    monkeypatch.delenv("SDDX_STORE")
    assert default_root().name == "sddx"


# the command line


def test_why_names_what_differs(lab: Laboratory, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings by dotted name with both values, sources by file, and inputs with the reasons behind them."""
    store = lab.store()
    a = store.build(lab.stages.measure, {}, runtime=Runtime(), loss={"weight": 1.0})
    lab.edit("lab/maths/deep.py", lambda text: "ONE = 2\n")
    b = store.build(lab.stages.measure, {}, runtime=Runtime(), loss={"weight": 2.0}, value=4)
    below = [store.build(lab.stages.after, {"base": artifact}, runtime=Runtime()) for artifact in (a, b)]
    assert main(["--store", str(store.root), "why", a.key[:20], b.key[:20]]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["spec loss.weight: 1.0 | 2.0", "spec value: (absent) | 4"]
    assert [line.split(":")[0] for line in said[2:]] == ["source lab/maths/deep.py"]
    assert main(["--store", str(store.root), "why", below[0].key, below[1].key]) == 0
    nested = capsys.readouterr().out
    assert f"input: measure {a.key[:12]} | measure {b.key[:12]}\n  spec loss.weight: 1.0 | 2.0" in nested
    assert main(["--store", str(store.root), "why", a.key, a.key]) == 0
    assert capsys.readouterr().out == "the recipes are the same\n"


def test_another_format_is_told_and_never_built_over(lab: Laboratory) -> None:
    """An artifact that a later version wrote may be sound: it is named, not replaced."""
    artifact = lab.store().build(lab.stages.measure, {}, runtime=Runtime())
    path = artifact.path / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has format 2, and this version of sddx reads format 1"):
        lab.store().build(lab.stages.measure, {}, runtime=Runtime())
    assert (artifact.path / "result.txt").exists() and lab.calls == 1


def test_a_family_moves_the_keys_of_its_own_models_alone(lab: Laboratory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of families are in no source; what they say of a model is in the keys of what reads it."""
    assert not [one for one in digest.stage_source(evaluate).definitions if "families" in one.module.file]
    configs = [LlamaConfig(), OPTConfig()]
    before = [families.reading(config) for config in configs]
    monkeypatch.setitem(families.FAMILIES, "opt", families.Family(has_bias=False))
    monkeypatch.setitem(families.FAMILIES, "new", families.Family(has_bias=True))
    after = [families.reading(config) for config in configs]
    assert after[0] == before[0] and after[1] != before[1]
    model = Artifact("model", "0" * 64, lab.folder)
    models = [{"base": replace(model, reading=each)} for each in ("", "a", "b")]
    keys = {digest.recipe(lab.stages.after, inputs, {}).key for inputs in models}
    assert len(keys) == 3


def test_why_says_of_a_run_what_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run's configuration: what is there, what is to be built, and the setting that makes it another."""
    store = Store(tmp_path / "store")
    with composed(*SMALL, "loss=none", f"store={store.root}") as cfg:
        config = resolve(cfg)
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert main(["why", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "score" in said and "the store has no artifact of this stage yet" in said
    _ = Run(store, Runtime(quiet=True), method(config)).scores
    config["calibration"]["size"] = 31
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert main(["why", str(tmp_path)]) == 0
    assert "  spec calibration.size: 32 | 31" in capsys.readouterr().out.splitlines()


def test_why_refuses_an_unclear_key(lab: Laboratory, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown prefix and one that fits several artifacts give a clear error and status 2."""
    store = lab.store()
    for value in (1, 2):
        store.build(lab.stages.measure, {}, runtime=Runtime(), value=value)
    assert main(["--store", str(store.root), "why", "nothing", ""]) == 2
    assert main(["--store", str(store.root), "why", "", ""]) == 2
    said = capsys.readouterr().err
    assert "no artifact has a key that starts with 'nothing'" in said and "2 artifacts have a key" in said


def test_verify_finds_damage(lab: Laboratory, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0 while all is sound; 1 and the file's name afterwards."""
    store = lab.store()
    artifact = store.build(lab.stages.measure, {}, runtime=Runtime())
    assert main(["--store", str(store.root), "verify"]) == 0
    (artifact.path / "result.txt").write_text("99")
    assert main(["--store", str(store.root), "verify"]) == 1
    assert f"damaged: measure {artifact.key[:12]}: result.txt" in capsys.readouterr().out


def test_gc_takes_leftovers_and_what_is_old(lab: Laboratory, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run deletes nothing; gc takes partial and damaged folders, and with an age what was not used."""
    store = lab.store()
    kept, old, damaged = (store.build(lab.stages.measure, {}, runtime=Runtime(), value=one) for one in (1, 2, 3))
    partial = kept.path.with_name("0" * 64 + ".partial")
    partial.mkdir()
    (partial / "half").write_bytes(b"x" * 2048)
    (damaged.path / "result.txt").unlink()
    month_ago = time.time() - 30 * 86400
    for artifact in (kept, old):
        os.utime(artifact.path / "manifest.json", (month_ago, month_ago))
    store.build(lab.stages.measure, {}, runtime=Runtime(), value=1)  # a hit is a use
    assert main(["--store", str(store.root), "gc", "--older-than", "7", "--dry-run"]) == 0
    assert partial.exists() and old.path.exists() and "would be freed" in capsys.readouterr().out
    assert main(["--store", str(store.root), "gc"]) == 0
    assert not partial.exists() and not damaged.path.exists() and old.path.exists()
    assert "unfinished, 2.0 KiB" in capsys.readouterr().out
    assert main(["--store", str(store.root), "gc", "--older-than", "7"]) == 0
    assert kept.path.exists() and not old.path.exists()


def test_gc_leaves_what_can_go_on(lab: Laboratory, capsys: pytest.CaptureFixture[str]) -> None:
    """What a stopped stage saved to resume from is old from then on, and not a leftover."""
    store = lab.store()
    made = store.build(lab.stages.measure, {}, runtime=Runtime(), value=1)
    saved = made.path.with_name("0" * 64 + ".partial") / "resume"
    saved.mkdir(parents=True)
    month_ago = time.time() - 30 * 86400
    assert main(["--store", str(store.root), "gc", "--older-than", "7"]) == 0 and saved.exists()
    os.utime(saved, (month_ago, month_ago))
    assert main(["--store", str(store.root), "gc"]) == 0 and saved.exists()
    assert main(["--store", str(store.root), "gc", "--older-than", "7"]) == 0 and not saved.exists()
    assert "stopped 30 days ago" in capsys.readouterr().out


def unreadable(artifact: Artifact) -> None:
    """What the file system refuses to read, for root too: a folder where the manifest was."""
    path = artifact.path / "manifest.json"
    path.rename(path.with_suffix(".kept"))
    path.mkdir()


def of_another_version(artifact: Artifact) -> None:
    path = artifact.path / "manifest.json"
    path.write_text(json.dumps({"format": 99, "files": json.loads(path.read_text())["files"]}))


@pytest.mark.parametrize("harm", [unreadable, of_another_version])
def test_what_may_be_sound_is_never_deleted(harm, lab: Laboratory, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither by gc nor by a build of the same, and it is named; the others are listed."""
    store = lab.store()
    healthy, other = (store.build(lab.stages.measure, {}, runtime=Runtime(), value=value) for value in (1, 2))
    harm(healthy)
    manifest_there = str(healthy.path / "manifest.json")
    for asked, status in (("gc", 0), ("ls", 0), ("verify", 1)):
        assert main(["--store", str(store.root), asked]) == status
        assert manifest_there in capsys.readouterr().out
    with pytest.raises(UserError, match="remove .* to build it again"):
        store.build(lab.stages.measure, {}, runtime=Runtime(), value=1)
    assert (healthy.path / "result.txt").read_text() == "21" and other.path.exists()
    assert main(["--store", str(store.root), "ls"]) == 0
    assert "1 artifacts" in capsys.readouterr().out


def test_a_disk_that_fails_costs_no_artifact(
    lab: Laboratory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error in reading a file's bytes says nothing of the file."""
    store = lab.store()
    artifact = store.build(lab.stages.measure, {}, runtime=Runtime(), value=1)

    def fail(path: Path, *given: object) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(manifest, "checksum", fail)
    assert main(["--store", str(store.root), "gc"]) == 0
    assert "Input/output error" in capsys.readouterr().out and artifact.path.exists()


def test_gc_touches_nothing_that_a_store_did_not_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given the wrong folder by mistake, and one with links that lead to themselves."""
    work = tmp_path / "papers" / "2026" / "pruning" / "draft.tex"
    work.parent.mkdir(parents=True)
    work.touch()
    for place in (tmp_path / "loop", tmp_path / "papers" / "loop"):
        place.symlink_to(place)
    for asked in ("gc", "ls", "verify"):
        assert main(["--store", str(tmp_path), asked]) == 0
    assert work.exists() and "0 artifacts" in capsys.readouterr().out


def test_gc_leaves_what_is_being_built(lab: Laboratory) -> None:
    """A partial folder whose lock is held stays."""
    lab.edit(
        "lab/stages.py",
        lambda text: (
            text
            + textwrap.dedent("""
        from sddx.commands.store import main

        def building(out, *, runtime):
            main(["--store", str(out.parents[2]), "gc"])
            assert out.exists()
            (out / "x").touch()
    """)
        ),
    )
    assert lab.store().build(lab.stages.building, {}, runtime=Runtime()).path.exists()


def test_ls_as_a_program(lab: Laboratory) -> None:
    """`sddx store ls` prints a line for each artifact, and works where there is no store yet."""
    store = lab.store()
    artifacts = [store.build(lab.stages.measure, {}, runtime=Runtime(), value=value) for value in (1, 2)]
    command = [sys.executable, "-m", "sddx.store", "ls"]

    def listed(root: Path) -> list[str]:
        environment = os.environ | {"PYTHONPATH": str(sources.PACKAGE.parent), "SDDX_STORE": str(root)}
        return subprocess.check_output(command, env=environment, text=True).splitlines()

    lines = listed(store.root)
    assert [line.split()[:2] for line in lines[1:3]] == [["measure", each.key[:12]] for each in artifacts]
    assert lines[3].startswith("2 artifacts")
    assert listed(lab.folder / "nowhere")[-1].startswith("0 artifacts")
    assert not (lab.folder / "nowhere").exists()


LEASE = """
import sys, time
from pathlib import Path
from sddx.files import lock
lock.file_system, lock.LEASE = lambda path: "nfs4", 2.0
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_nothing_is_shown_to_others_once_the_lease_is_lost(tmp_path, monkeypatch) -> None:
    """A process that slept looks before it publishes: its lock's file is another's by then."""
    monkeypatch.setattr(lock, "file_system", lambda path: "nfs4")
    path, told = tmp_path / "lock", []
    with pytest.raises(UserError, match="lost for want of a sign of life.*run it again"):
        with lock.hold(path) as require_held:
            require_held()
            path.rename(tmp_path / "taken")
            path.write_text("another's")
            require_held()
    path.unlink()
    with lock.hold(path, lost=told.append):
        path.rename(tmp_path / "taken")
    assert len(told) == 1 and "lost" in told[0]


def test_seconds_are_those_of_all_attempts(lab: Laboratory) -> None:
    """Of a stage that was stopped and went on with what it saved."""
    lab.edit(
        "lab/stages.py",
        lambda text: (
            text
            + textwrap.dedent("""
        import time

        def resumed(out, *, runtime):
            first = not (out / "resume").exists()
            (out / "resume").mkdir(exist_ok=True)
            time.sleep(0.3)
            if first:
                raise KeyboardInterrupt
            (out / "x").touch()
    """)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        lab.store().build(lab.stages.resumed, {}, runtime=Runtime())
    made = lab.store().build(lab.stages.resumed, {}, runtime=Runtime())
    assert 0.6 <= manifest.read(made.path)["seconds"] < 3 and not (made.path / "resume").exists()


def test_a_lease_is_kept_alive_and_taken_over_when_its_holder_dies(tmp_path, monkeypatch) -> None:
    """Where machines share a file system, the system's locks are not trusted."""
    monkeypatch.setattr(lock, "file_system", lambda path: "nfs4")
    monkeypatch.setattr(lock, "LEASE", 2.0)
    path, waited = tmp_path / "lock", []
    holder = subprocess.Popen([sys.executable, "-c", LEASE, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    time.sleep(3)  # longer than the lease: it lives by its heartbeat
    assert lock.is_held(path)
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with lock.hold(path, waiting=lambda: waited.append(True)):
        assert lock.is_held(path) and time.monotonic() - start < 10
    assert not lock.is_held(path)


@pytest.mark.parametrize(
    ("mounts", "place", "kind"),
    [
        ("a / ext4 rw\nb /data nfs4 rw\n", "/data/store", "nfs4"),
        ("a / ext4 rw\nb /data nfs4 rw\n", "/database/store", "ext4"),
        ("a / ext4 rw\nauto /data autofs rw\nb /data nfs4 rw\n", "/data/store", "nfs4"),
        ("a / overlay rw\nb /scratch lustre rw\nc /scratch/tmp tmpfs rw\n", "/scratch/tmp/x", "tmpfs"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(mounts, place, kind, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **given: mounts)
    assert lock.file_system(Path(place)) == kind
    assert lock.is_shared(Path(place)) == (kind in ("nfs4", "lustre"))
