"""Files that somebody else may have cut short or edited: read in one place, and in the form that is relied on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from sddx.errors import UserError

FORMAT = 1  # of what is written here and read later: manifests, summaries


class Dead(UserError):
    """A file that is missing, or that no program could read."""


class Form(BaseModel):
    """What a JSON object must hold, each entry of its type and no other; whatever else it holds may stand there."""

    model_config = ConfigDict(strict=True)


def having(*keys: str) -> AfterValidator:
    """For mappings with keys of all kinds: these must be among them."""

    def check(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
        if missing := [key for key in keys if key not in mapping]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return mapping

    return AfterValidator(check)


def read(path: Path, parse: Callable[[str], Any] = str) -> Any:
    """A text file in UTF-8 as `parse` reads it. Raises Dead where it is missing or cannot be parsed (ValueError),
    and UserError where it cannot be read at the moment."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise Dead(f"{path} is missing.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise Dead(f"{path} is damaged: {(str(error) or 'empty').splitlines()[0]}.") from None


def read_json(path: Path, form: type[BaseModel]) -> Any:
    """The plain content of a JSON file of this form. Raises Dead and UserError as `read` does, and UserError, which
    says where, for a file of another form."""
    content = read(path, json.loads)
    if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path} has format {content['format']}, and this version of sddx reads format {FORMAT}. Read it with "
            "the version that wrote it."
        )
    try:
        form.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where, wrong = ".".join(map(str, first["loc"])), re.sub(r" or instance of \w+", "", first["msg"])
        raise UserError(f"{path} is damaged, or of another version: {where and where + ': '}{wrong}.") from None
    return content
