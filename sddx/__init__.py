"""sddx: cut layers out of a language model, let it teach itself, measure what came back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def load(summary: str | Path, *, device: str = "cpu") -> tuple[Any, Any]:
    """The recovered model (in eval mode) and its tokenizer, from a run's `summary.json`.

    Raises UserError where the store that the run wrote to, or the base model, is gone.
    """
    import json

    from sddx.models.load import load_tokenizer
    from sddx.models.student import load_student
    from sddx.records import Cut, UserError
    from sddx.store.manifest import find

    fields = json.loads(Path(summary).read_text())
    keys, base, found = fields["artifacts"], Path(fields["model_path"]), {}
    for stage in (stage for stage in ("prune", "patch", "train") if stage in keys):
        place = find(Path(fields["store"]), stage, keys[stage])
        if place is None or not base.is_dir():
            gone = base if place else f"{stage} {keys[stage]} in the store {fields['store']}"
            raise UserError(f"{gone} is gone. Run the same command again to rebuild it.")
        found[stage] = place
    student = load_student(
        base,
        found["train"],
        cut=Cut.load(found["prune"] / "cut.json"),
        base=keys["model"],
        patch=found.get("patch"),
        dtype=fields["dtype"],
        attention=fields["attention"],
        device=device,
    )
    return student.model, load_tokenizer(base)
