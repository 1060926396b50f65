"""One cell of a sweep, run from its folder alone, in whatever process it was given to:
`python -m sddx.sweep.worker FOLDER TASK`."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.utils import get_method
from omegaconf import OmegaConf

from sddx.config.printing import print_anywhere
from sddx.errors import Interrupted, UserError
from sddx.sweep import cells


def perform(folder: Path, task: str) -> None:
    """Calls `task(config, folder)`, named by its path, with the configuration that lies in the cell's folder.

    What it raises, SystemExit too, ends in that folder, and the cell is failed; an interrupt, or the end after
    SIGTERM, is passed on. A cell that is done already, as one that a scheduler starts twice, is left alone.
    """
    start = time.perf_counter()
    with cells.running(folder) as has_ended, _logged(folder):
        if has_ended:
            return
        try:
            get_method(task)(OmegaConf.to_container(OmegaConf.load(folder / cells.CONFIG)), folder)
            failure = None
        except (KeyboardInterrupt, Interrupted):
            cells.write(folder, state="interrupted", seconds=time.perf_counter() - start)
            raise
        except BaseException as error:
            # Its scheduler took it back, to start it again; one that does so no more says so by another error.
            if isinstance(error, SystemExit) and cells.read(folder)["state"] == "waiting":
                raise
            failure = error
        finish(folder, failure, time.perf_counter() - start)


def finish(folder: Path, failure: BaseException | None, seconds: float) -> None:
    """The end of a cell: its state, the reason and the traceback where it failed."""
    if failure is None:
        cells.write(folder, state="done", seconds=seconds)
        return
    trace = "".join(traceback.format_exception(failure))
    (folder / cells.TRACEBACK).write_text(trace, encoding="utf-8", errors="backslashreplace")
    reason = str(failure).strip() or type(failure).__name__
    kind = "" if isinstance(failure, UserError) else f"{type(failure).__name__}: "
    cells.write(folder, state="failed", seconds=seconds, reason=f"{kind}{reason}")


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """What is logged meanwhile goes to the cell's own file too."""
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


if __name__ == "__main__":
    print_anywhere()
    perform(Path(sys.argv[1]), sys.argv[2])
