"""To the Hugging Face hub, on request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sddx.errors import UserError


def require(name: str, adapter: str, *, private: bool) -> None:
    """Raises UserError, before any work, where a push to the repository `name` cannot succeed."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if adapter == "apart":
        raise UserError(
            "push=... uploads one model, and adapter=apart makes two, of which the adapter names the base by its "
            "folder here. Use adapter=merged, or upload base and adapter by hand and set base_model_name_or_path."
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"push={name} is no name of a repository: {error} Give push=org/name.") from error
    if get_token() is None:
        raise UserError("push=... needs a token of the Hugging Face hub, and there is none. Run `hf auth login`.")
    with _uploading(name, "Nothing was exported yet: leave push=... out to export alone, or try again."):
        _require_vacant(name, private)


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a finished folder to a model repository, which is made; returns its address.

    Raises UserError where a repository of that name holds something already, where it is public and the upload is
    to be private, and where the hub cannot be reached or refuses. The folder stays as it is.
    """
    from huggingface_hub import HfApi

    again = f"hf upload {name} {folder}" + (" --private" if private else "")
    with _uploading(name, f"The export itself is complete: {folder}. To try again: {again}"):
        _require_vacant(name, private)
        HfApi().create_repo(name, private=private, exist_ok=True)
        message = "Recovered model, exported by sddx"
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return f"https://huggingface.co/{name}"


def _require_vacant(name: str, private: bool) -> None:
    from huggingface_hub import HfApi

    if not HfApi().repo_exists(name):
        return
    info = HfApi().model_info(name)
    if {file.rfilename for file in info.siblings or []} - {".gitattributes"}:
        raise UserError(f"{name} exists on the hub and is not empty. Give another name.")
    if private and not info.private:
        raise UserError(f"{name} exists on the hub and is public. Give another name, or private=false.")


@contextmanager
def _uploading(name: str, then: str) -> Iterator[None]:
    """Around calls to the hub: raises UserError where one fails, with what to do then."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except UserError as error:
        raise UserError(f"{error} {then}") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UserError(f"the upload to {name} failed: {type(error).__name__}: {error}. {then}") from error
