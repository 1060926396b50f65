"""The Hugging Face hub: asked with every way in which that fails as the user's to mend, and what of it is here."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from functools import cache
from pathlib import Path

import httpx
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from sddx.records import UserError
from sddx.store.manifest import replace_text

COMMIT = re.compile("[0-9a-f]{40}")
PATIENCE = 10.0  # seconds that the hub has to answer a question
LOCAL = {EACCES, EDQUOT, ENOSPC, EPERM, EROFS}  # errors of this machine's disk, not of the hub
_log = logging.getLogger(__name__)


class Unreachable(UserError):
    """The hub could not be asked: there is no network, HF_HUB_OFFLINE is set, or the hub itself fails."""


@contextmanager
def asking(kind: str, name: str, revision: str | None, *, otherwise: str) -> Iterator[None]:
    """Around calls that reach for a repository of the hub (`kind` model or dataset): raises UserError where it does
    not exist, is gated and this account has no access, has no such revision, where the token is refused or the
    cache cannot be written; and Unreachable, with `otherwise`, which says what to do, where the hub cannot be
    asked."""
    what, token = f"{kind} {name}", get_token()
    try:
        yield
    except GatedRepoError as error:
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        who = "this account has no access" if token else "no access token is set on this machine"
        raise UserError(
            f"{what} is gated and {who}. Accept its licence at {page}, then log in with `hf auth login` (a "
            "fine-grained token must be allowed to read gated repositories)."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{what} has no revision {revision!r}. Give an existing branch, tag or commit.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        private = "is private to others" if token else "is private and no access token is set (`hf auth login`)"
        raise UserError(f"The hub has no {what}, or it {private}. Check the name.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, XetDownloadError, OSError) as error:
        response = getattr(error, "response", None)
        if response is not None and response.status_code in (401, 403):
            raise UserError(
                f"The hub refuses the access token of this machine ({what}): {error}. Log in again with "
                "`hf auth login`, and look whether HF_TOKEN holds an old one."
            ) from error
        if getattr(error, "errno", None) in LOCAL:
            raise UserError(
                f"The hub's cache {constants.HF_HUB_CACHE} cannot be written ({what}): {error}. Make room or mend "
                "its rights, or put the caches elsewhere with HF_HOME=/another/folder."
            ) from error
        raise Unreachable(f"{_reason(error)}: {otherwise}") from error


def _reason(error: Exception) -> str:
    offline = "HF_HUB_OFFLINE is set (unset it where there is a network)"
    return offline if constants.HF_HUB_OFFLINE else type(error).__name__


@cache
def current_commit(name: str, revision: str | None) -> str:
    """The commit that a dataset's revision (None: its main branch) points to at the hub; asked once a process, so
    that all of it speaks of the same rows. Raises UserError as `asking` does."""
    otherwise = (
        f"the commit of dataset {name} (revision {revision}) cannot be asked for, and no fetch noted it here. Run "
        "python -m sddx.fetch with the same settings where there is a network, give a revision of 40 hexadecimal "
        "digits that is in the cache of `datasets`, or the rows in a local file (data_files=...); "
        "dataset=tiny_arithmetic needs none of it."
    )
    with asking("dataset", name, revision, otherwise=otherwise):
        return str(HfApi().dataset_info(name, revision=revision, timeout=PATIENCE).sha)


def commit(name: str, revision: str | None) -> str:
    """As `current_commit`, but where the hub cannot be asked, the commit that was fetched (see `note`)."""
    if COMMIT.fullmatch(revision or ""):
        return str(revision)
    try:
        return current_commit(name, revision)
    except Unreachable:
        noted = _noted().get(_entry(name, revision))
        if noted is None:
            raise
        _say(f"the hub cannot be asked: dataset {name} is taken at commit {noted}, as it was fetched")
        return noted


@cache
def _say(line: str) -> None:
    """Logs a line once a process."""
    _log.warning(line)


def notes() -> Path:
    """The file, beside the hub's cache, that says which commits of datasets were fetched."""
    return Path(constants.HF_HUB_CACHE).expanduser().parent / "sddx_commits.json"


def note(commits: Mapping[tuple[str, str | None], str]) -> None:
    """Remember the commits that were fetched for datasets, by name and the revision asked for. Raises UserError
    where the file cannot be written."""
    noted = _noted() | {_entry(*asked): found for asked, found in commits.items()}
    try:
        notes().parent.mkdir(parents=True, exist_ok=True)
        replace_text(notes(), json.dumps(noted, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(
            f"{notes()} cannot be written ({error.strerror}). All was fetched; without it, give the *.revision "
            "settings where there is no network, or fetch again with HF_HOME=/another/folder."
        ) from error


def _noted() -> dict[str, str]:
    """What was noted; nothing where no fetch left a file that can be read."""
    try:
        return dict(json.loads(notes().read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _entry(name: str, revision: str | None) -> str:
    return f"{name}@{revision or constants.DEFAULT_REVISION}"


def unpacked(name: str, subset: str | None, at: str = "*") -> list[Path]:
    """Where `datasets` keeps the rows of a subset (None: any) of a dataset, at one commit or at all: its folders
    <owner>___<name>/<subset>/<version>/<commit>, newest last, which is the one it reads without a network."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, last = name.split("/")
    folder = Path(config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, camelcase_to_snakecase(last)])
    found = [path.parent for path in folder.glob(f"{subset or '*'}/*/{at}/dataset_info.json")]
    whole = [path for path in found if path.suffix != ".incomplete"]
    return sorted(whole, key=lambda path: path.stat().st_mtime)
