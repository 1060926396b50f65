"""What rewriting refuses before any work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from sddx.config.build import Settings, build
from sddx.errors import UserError
from sddx.records import Example
from sddx.stages.local_model import Check, LocalModel


def of_settings(method: Settings) -> list[Check]:
    """There is a template to rewrite by, what writes the answers is installed, and what a prompt shows can be had
    and is compared with nothing else."""
    from sddx.data.templates import rewriting_prompt

    checks: list[Check] = []
    if method["loss"]["data"] == "self":
        checks.append(lambda: rewriting_prompt(method["dataset"]["rewrite"], "", ""))
    if method["loss"]["data"] != "reference":
        checks.append(lambda: getattr(build(method["generation"]), "require", lambda: None)())
    if method["selfdata"].get("reference") == "wrong":
        checks += [lambda: _check_strangers(method), lambda: _check_alone(method)]
    return checks


def of_model(method: Settings, model: LocalModel) -> list[Check]:
    """Of the rows to train on that are here, one leaves room for an answer."""
    return [lambda: _check_room(method, model)] if method["loss"]["data"] != "reference" else []


def _check_strangers(method: Settings) -> None:
    """Where prompts show the references of other rows, they show any, and answers are not compared with their own.
    Raises UserError."""
    if (data := method["loss"]["data"]) != "self":
        raise UserError(
            f"selfdata.reference=wrong says what rewriting prompts show, and there are none with loss.data={data}. "
            "Use loss=sdd, or selfdata.reference=right."
        )
    check = (method["dataset"].get("check") or {}).get("_target_", "").rpartition(".")[2]
    if method["selfdata"].get("check", "dataset") == "dataset" and check not in ("none", "open_answer"):
        raise UserError(
            "selfdata.reference=wrong shows the reference of another row, and selfdata.check=dataset compares the "
            f"answer with the row's own ({check}), which would refuse nearly all. Use selfdata.check=none."
        )


def _check_alone(method: Settings) -> None:
    """No row is written alone, where its prompt is to show another one's reference. Raises UserError."""
    from sddx.data.shards import SHARD_ROWS

    size = method["dataset"].get("size")
    alone = [f"validation={method['validation']}"] if method["validation"] == 1 else []
    if (rows := len(_training(method)) or size) and rows % SHARD_ROWS == 1:
        alone.append(f"dataset.size={size}")
    if alone:
        raise UserError(
            f"selfdata.reference=wrong shows the reference of another row of a shard of {SHARD_ROWS}, and "
            f"{' and '.join(alone)} leaves one row alone in its shard. Use one more or one less."
        )


def _check_room(method: Settings, model: LocalModel) -> None:
    from sddx.data.encode import prompts_of
    from sddx.models.load import context_of

    new = method["generation"].get("max_new_tokens")
    rooms = [context_of(model.config), method["generation"].get("max_model_len")]
    if new is None or not any(rooms) or not (rows := _training(method)):
        return
    room = min(filter(None, rooms))
    if all(len(prompts_of(model.tokenizer, [row])[0]) + new > room for row in _shown(method, rows)):
        raise UserError(
            f"No prompt leaves room for generation.max_new_tokens={new} in {room} tokens, so that the model would "
            "write nothing and every row would keep its reference. Lower generation.max_new_tokens."
        )


def _training(method: Settings) -> Sequence[Example]:
    """The rows to train on, as far as they are on this machine."""
    from sddx.data.check import examples_here

    return examples_here(method["dataset"], method["validation"])[1]


def _shown(method: Settings, rows: Sequence[Example]) -> Iterable[Example]:
    """The rows with the prompts that the model answers: where it is guided, with their references in them."""
    from sddx.data.templates import rewriting_prompt

    if method["loss"]["data"] != "self":
        return rows
    kind = method["dataset"]["rewrite"]
    return (replace(row, prompt=rewriting_prompt(kind, row.prompt, row.response)) for row in rows)
