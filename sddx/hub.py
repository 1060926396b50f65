"""Asking the Hugging Face hub, with every way in which that fails as the user's to mend."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sddx.records import UserError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def asking(kind: str, name: str, revision: str | None, *, otherwise: str) -> Iterator[None]:
    """Around calls that reach for a repository of the hub (`kind` model or dataset): raises UserError where it is
    gated and this account has no access, where it has no such revision, where the hub refuses the access token,
    where what comes cannot be written, and with `otherwise`, which says what to do, where it cannot be reached or
    does not exist."""
    try:
        yield
    except GatedRepoError as error:
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        who = "this account has no access" if get_token() else "no access token is set on this machine"
        raise UserError(
            f"{kind} {name} is gated and {who}. Accept its licence at {page}, then log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{kind} {name} has no revision {revision!r}. Give an existing branch, tag or commit."
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        raise UserError(_reason(error, kind, name, otherwise)) from error


def _reason(error: Exception, kind: str, name: str, otherwise: str) -> str:
    """What went wrong, and what to do, by the error that the libraries raised."""
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
