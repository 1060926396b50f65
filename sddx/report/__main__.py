"""`python -m sddx.report [FOLDER ...]`: what the runs of a sweep, or of the whole store, found."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sddx.records import UserError
from sddx.report import page
from sddx.report.summary import write
from sddx.store import default_root


def main(arguments: list[str] | None = None) -> int:
    """Writes report.html, report.md and report.csv; returns the exit status, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m sddx.report", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="run or sweep folders (default: all of the store)")
    parser.add_argument("--store", type=Path, default=default_root(), help="(default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="the folder to write (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        runs = page.of_folders(given.folders) if given.folders else page.of_store(given.store)
        if not runs:
            where = ", ".join(map(str, given.folders)) or f"the store {given.store}"
            raise UserError(f"There is no finished run in {where}. Give the folder of a run or a sweep.")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    found = page.contents(runs, page.failed(given.folders))
    given.out.mkdir(parents=True, exist_ok=True)
    for name, text in (("html", page.html(found)), ("md", page.markdown(found)), ("csv", page.table_of_runs(runs))):
        write(given.out / f"report.{name}", text)
    print(f"{len(runs)} runs: {given.out / 'report.html'}, and the same as report.md and report.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
