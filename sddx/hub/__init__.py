"""The Hugging Face hub: asked with every way in which that fails as the user's to mend, and what of it is here."""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import constants

from sddx.errors import UserError
from sddx.store.manifest import replace_text

COMMIT = re.compile("[0-9a-f]{40}")
PATIENCE = 10.0  # seconds that the hub has to answer a question
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_log = logging.getLogger(__name__)


class Unreachable(UserError):
    """The hub could not be asked: there is no network, HF_HUB_OFFLINE is set, or the hub itself fails."""


@contextmanager
def asking(kind: str, name: str, revision: str | None, *, otherwise: str) -> Iterator[None]:
    """Around calls that reach for a repository of the hub (`kind` model or dataset): raises UserError where it is
    gated and this account has no access, where it has no such revision, where the hub refuses the access token,
    where what comes cannot be written, and with `otherwise`, which says what to do, where it does not exist or, as
    Unreachable, where the hub cannot be asked."""
    import httpx
    from huggingface_hub import errors, get_token

    failures = (
        errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, errors.XetDownloadError,
        httpx.HTTPError, OSError,
    )  # fmt: skip
    try:
        yield
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        who = "this account has no access" if get_token() else "no access token is set on this machine"
        raise UserError(
            f"{kind} {name} is gated and {who}. Accept its licence at {page}, then log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{kind} {name} has no revision {revision!r}. Give an existing branch, tag or commit."
        ) from error
    except failures as error:
        raise _kind(error)(_reason(error, kind, name, otherwise)) from error


def _kind(error: Exception) -> type[UserError]:
    """Whether the hub answered, with a refusal, or not at all."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        unanswered = error.response.status_code >= 500 or error.response.status_code == 429
    else:
        unanswered = not isinstance(error, HFValidationError) and getattr(error, "errno", None) not in UNWRITABLE
    return Unreachable if unanswered else UserError


def _reason(error: Exception, kind: str, name: str, otherwise: str) -> str:
    """What went wrong, and what to do, by the error that the libraries raised."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return (
            f"{kind} {name} cannot be written to the cache {constants.HF_HUB_CACHE}: {error}. Make room there, or "
            "put the caches elsewhere with HF_HOME=/another/folder; what was downloaded is not downloaded again."
        )
    response = error.response if isinstance(error, HfHubHTTPError) else None
    if response is not None and response.status_code == 401 and not isinstance(error, RepositoryNotFoundError):
        return (
            f"the hub does not accept the access token of this machine, so {kind} {name} cannot be asked for. Log "
            "in again with `hf auth login`; where HF_TOKEN is set, it is used instead: mend or unset it."
        )
    if constants.HF_HUB_OFFLINE:
        otherwise = f"HF_HUB_OFFLINE is set, so the hub is not asked. {otherwise}"
    said = next(iter(str(error).splitlines()), "")
    return f"{otherwise} ({type(error).__name__}: {said})"


@cache
def current_commit(name: str, revision: str | None) -> str:
    """The commit that a dataset's revision (None: its main branch) points to at the hub; asked once a process, so
    that all of it speaks of the same rows. Raises UserError as `asking` does."""
    from huggingface_hub import HfApi

    otherwise = (
        f"the commit of dataset {name} (revision {revision}) is not known: the hub does not have it, or cannot be "
        "reached and no fetch noted it here. Check the name; run sddx fetch with the same settings where "
        "there is a network, give a revision of 40 hexadecimal digits that is in the cache of `datasets`, or the "
        "rows in a local file (data_files=...); dataset=tiny_arithmetic needs none of it."
    )
    with asking("dataset", name, revision, otherwise=otherwise):
        return str(HfApi().dataset_info(name, revision=revision, timeout=PATIENCE).sha)


@cache
def commit(name: str, revision: str | None) -> str:
    """As `current_commit`, but where the hub cannot be asked, the commit that was fetched (see `note`), with a line
    that says so."""
    if COMMIT.fullmatch(revision or ""):
        return str(revision)
    try:
        return current_commit(name, revision)
    except Unreachable:
        noted = _noted().get(_entry(name, revision))
        if noted is None:
            raise
        _log.warning("the hub cannot be asked: dataset %s is taken at commit %s, as it was fetched", name, noted)
        return noted


def notes() -> Path:
    """The file, beside the hub's cache, that says which commits of datasets were fetched."""
    return Path(constants.HF_HUB_CACHE).expanduser().parent / "sddx_commits.json"


def note(commits: Mapping[tuple[str, str | None], str]) -> None:
    """Remember the commits that were fetched for datasets, by name and the revision asked for. Raises UserError
    where the file cannot be written."""
    noted = _noted() | {_entry(*asked): sha for asked, sha in commits.items()}
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
    folders = [path.parent for path in folder.glob(f"{subset or '*'}/*/{at}/dataset_info.json")]
    whole = [path for path in folders if path.suffix != ".incomplete"]
    return sorted(whole, key=lambda path: path.stat().st_mtime)
