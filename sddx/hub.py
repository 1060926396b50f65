"""Asking the Hugging Face hub, with every way in which that fails as the user's to mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)

from sddx.records import UserError


@contextmanager
def asking(kind: str, name: str, revision: str | None, *, otherwise: str) -> Iterator[None]:
    """Around calls that reach for a repository of the hub (`kind` model or dataset): raises UserError where it is
    gated and this account has no access, where it has no such revision, and with `otherwise`, which says what to
    do, where it cannot be reached or does not exist."""
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
        raise UserError(f"{type(error).__name__}: {otherwise}") from error
