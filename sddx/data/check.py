"""What rows must be, told before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sddx.config.build import build, tried
from sddx.config.shared import once
from sddx.data import encode
from sddx.data.checkers import Reason
from sddx.data.remarks import numbered, of_group, remark
from sddx.data.sources import of_hub, pinned
from sddx.data.split import hold_out, with_held_out
from sddx.errors import UserError
from sddx.records import Dataset, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_texts(group: str, node: Mapping[str, Any]) -> None:
    """Raises UserError where the texts of `calibration` or `text` cannot be had. Those of the hub are not loaded:
    their commit is asked for."""
    with of_group(group):
        made = _made(node)
    if made is not None and not (isinstance(made, list) and all(isinstance(text, str) for text in made)):
        raise UserError(f"{group}._target_={node.get('_target_')} gives no list of texts. Use one that does.")


def require_rows(dataset: Mapping[str, Any], validation: int) -> None:
    """Raises UserError where the rows of a data set cannot be had, where none is left to train on, and where their
    answers cannot be compared. Those of the hub are not loaded: their commit is asked for."""
    with of_group("dataset"):
        if (made := _dataset(dataset, validation)) is None:
            return
        hold_out(made.examples, validation)
    if strange := [name for name in made.trains if not isinstance(name, str)]:
        raise UserError(f"dataset.trains={strange} holds what is no name of a task. Give a list of names.")
    answer = made.examples[0].response
    verdict = tried("dataset.check", made.check, answer, answer)
    if not isinstance(verdict, (bool, Reason)):
        raise UserError(f"dataset.check gives {verdict!r} for two texts, where true or false is needed.")


def examples_here(dataset: Mapping[str, Any], validation: int) -> tuple[list[Example], list[Example]]:
    """The rows that are held out and those that are trained on; none of a data set that the hub has."""
    with of_group("dataset"):
        made = _dataset(dataset, validation)
        return hold_out(made.examples, validation) if made is not None else ([], [])


def require_trainable(
    tokenizer: PreTrainedTokenizerBase, held_out: Sequence[Example], training: Sequence[Example], max_length: int
) -> None:
    """Raises UserError where no row keeps a token of its answer within `max_length` tokens, and tells which rows
    hold what the tokenizer reads as one of its control tokens."""
    encode.require_trainable(tokenizer, training, max_length)
    examples = [*held_out, *training]
    for token, places in _control_tokens(tokenizer, examples).items():
        remark(
            f"{len(places)} of {len(examples)} rows hold {token}, which this model's tokenizer reads as a control "
            f"token and not as text ({numbered(places)}, in the order of dataset.seed)"
        )


def _control_tokens(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> dict[str, list[int]]:
    """The places, from 1, of the examples that hold each special token of a tokenizer."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = list(dict.fromkeys([*added, *tokenizer.all_special_tokens]))
    texts = [f"{example.prompt}\n{example.response}" for example in examples]
    by_token = {token: [place for place, text in enumerate(texts, 1) if token in text] for token in tokens}
    return {token: places for token, places in by_token.items() if places}


def _dataset(node: Mapping[str, Any], validation: int) -> Dataset | None:
    made = _made(with_held_out(node, validation))
    if made is not None and not isinstance(made, Dataset):
        raise UserError(f"dataset._target_={node.get('_target_')} gives no Dataset. Use one of sddx.data.sources.")
    return made


def _made(node: Mapping[str, Any]) -> Any:
    """What a node gives; None for one whose rows the hub has."""
    if of_hub(node):
        pinned(node)
        return None
    return once(["made", node], lambda: build(node))
