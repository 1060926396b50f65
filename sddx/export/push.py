"""To the Hugging Face hub, on request."""

from __future__ import annotations

from pathlib import Path

from sddx.records import UserError


def require(name: str, adapter: str) -> None:
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


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a finished folder to a model repository, which is made; returns its address.

    Raises UserError where a repository of that name holds something already, and where the hub cannot be reached or
    refuses. The folder stays as it is.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        if api.repo_exists(name) and set(api.list_repo_files(name)) - {".gitattributes"}:
            raise UserError(f"{name} exists on the hub and is not empty. Give another name. {_stays(folder, name)}")
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Recovered model, exported by sddx")
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UserError(
            f"the upload to {name} failed: {type(error).__name__}: {error}. {_stays(folder, name)}"
        ) from error
    return f"https://huggingface.co/{name}"


def _stays(folder: Path, name: str) -> str:
    return f"The export itself is complete: {folder}. To try again: hf upload {name} {folder}"
