"""`sddx report [FOLDER ...]`: what the runs of a sweep, or of the whole store, found."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sddx.config import writable_folder
from sddx.config.arguments import exit_status
from sddx.config.build import Node
from sddx.report import page
from sddx.report.publish import publish, to_loggers
from sddx.store import default_root
from sddx.tracking import require


@exit_status
def main(arguments: list[str] | None = None) -> int:
    """Writes report.html, report.md and report.csv; returns the exit status, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="sddx report", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="run or sweep folders (default: all of the store)")
    parser.add_argument("--store", type=Path, default=default_root(), help="(default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="the folder to write (default: %(default)s)"
    )
    parser.add_argument("--wandb", choices=("offline", "online"), help="log it as a W&B run of its own too")
    parser.add_argument("--project", default="sddx", help="the W&B project (default: %(default)s)")
    parser.add_argument("--entity", help="the W&B entity (default: the user's own)")
    options = parser.parse_args(arguments)
    runs = page.of_folders(options.folders) if options.folders else page.of_store(options.store)
    page.require_runs(runs, ", ".join(map(str, options.folders)) or f"the store {options.store}")
    writable_folder(options.out, "--out")
    if options.wandb:
        require(loggers := {"wandb": _wandb(options)})
    contents = publish(runs, page.failed(options.folders), options.out)
    if options.wandb:
        to_loggers(runs, contents, options.out, loggers)
    print(contents["headline"])
    print(f"{len(runs)} runs: {options.out / 'report.html'}, and the same as report.md and report.csv")
    return 0


def _wandb(options: argparse.Namespace) -> Node:
    """W&B's logger as the flags have it."""
    of_run = {
        "project": options.project,
        "entity": options.entity,
        "mode": options.wandb,
        "group": None,
        "tags": [],
    }
    return {"_target_": "sddx.tracking.loggers.wandb", "_partial_": True, **of_run}


if __name__ == "__main__":
    sys.exit(main())
