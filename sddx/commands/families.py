"""Print for every family of transformers' causal language models what can be done with it.

    sddx families
    sddx families only=llama,gemma3,qwen3_5
    sddx families to=docs/families.md

only  names of families, as `model_type` in a model's config.json has them (default: all that transformers knows)
to    a file to write the table to as well, as Markdown

Each is tried on a narrow model with random weights: two of its blocks are taken out, and what is left is proven as
any pruned model is (the logits of the kept blocks run by hand, padding, decoding with and without the cache, saving
and loading, gradients); then one step of a LoRA adapter. Nothing is downloaded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from sddx.config import writable_folder
from sddx.config.arguments import exit_status, plain_arguments
from sddx.errors import UserError, near

ATTENTIONS = ("sdpa", "eager")
DEPTH = 8  # blocks of a narrow model
# Of families whose settings by default are those of no model that can be made small.
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 5]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 4},
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 4},
    "nemotron": {"num_key_value_heads": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]], "num_layers": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
}
HEAD = "| family | blocks | attention | branches | adapted | exports | sound |\n|---|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """What was found of one family; `mistake` says why it cannot be pruned, or is empty."""

    family: str
    blocks: str = ""
    attention: str = ""
    branches: bool = False
    adapted: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    mistake: str = ""

    def __str__(self) -> str:
        cells = [self.family, self.blocks, self.attention, "yes" if self.branches else "", ", ".join(self.adapted)]
        cells += [", ".join(self.exports), self.mistake or "yes"]
        return f"| {' | '.join(cell.replace('|', ' ').replace('_', chr(92) + '_') for cell in cells)} |"


@exit_status
def main(arguments: Sequence[str] | None = None) -> int:
    """Try families and print their table. Returns the exit status: 0, or 2 for a mistake of the user's."""
    argv = sys.argv[1:] if arguments is None else arguments
    values, known = plain_arguments(argv, __doc__, only=None, to=None), _known()
    names = values["only"].split(",") if values["only"] else known
    if wrong := [name for name in names if name not in known]:
        raise UserError(
            *(f"{name} is no family of causal language models.{near(name, known, '')}" for name in wrong)
        )
    if values["to"]:
        writable_folder(Path(values["to"]).parent, "to")
    print(HEAD)
    rows = []
    for row in tried(names):
        rows.append(row)
        print(row, flush=True)
    sound = sum(not row.mistake for row in rows)
    print(f"{sound} of {len(rows)} are sound.")
    if values["to"]:
        Path(values["to"]).write_text(page(rows), encoding="utf-8")
    return 0


def _known() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def page(rows: Sequence[Row]) -> str:
    """The table as a page."""
    from importlib.metadata import version

    sound = sum(not row.mistake for row in rows)
    return (
        f"# Families\n\nMade by `sddx families to=docs/families.md` with transformers {version('transformers')}: "
        f"{sound} of {len(rows)} families of causal language models lose two of {DEPTH} blocks of a narrow model "
        "with random weights and stay sound, and an adapter on them learns. One that fails is refused with its "
        "reason before work starts; where no narrow model can be made, the model itself is tried when it is there. "
        "*Branches*: attention and feed-forward branches can be removed apart, and patches fitted to the "
        "feed-forward branch or folded into it; other patches need no branches. *Attention*: the first of sdpa and "
        "eager that the family knows; where attention scores are capped (`attn_logit_softcapping`: Gemma2, "
        "VaultGemma) sdpa would leave the cap out, and `model.attention=eager` is asked for.\n\n"
        + "\n".join([HEAD, *map(str, rows)])
        + "\n"
    )


def tried(names: Sequence[str]) -> Iterator[Row]:
    """One row for each family."""
    import logging

    from transformers.utils import logging as said

    said.set_verbosity(logging.CRITICAL)
    said.disable_progress_bar()
    for name in names:
        try:
            yield _tried(name)
        except UserError as error:
            yield Row(name, mistake=_shortened(str(error), name))


def _shortened(mistake: str, name: str) -> str:
    """A mistake without what the page says of all of them, and without the folder that a narrow model was in."""
    from sddx.compression.soundness import ADVICE

    tried = f"A narrow {name} model with random weights was tried: "
    own = mistake.removeprefix(tried).removesuffix(ADVICE).strip()
    return re.sub(rf"{re.escape(gettempdir())}\S+", "its folder", " ".join(own.split()))[:200]


def _tried(name: str) -> Row:
    """Raises UserError where the family cannot be pruned or trained."""
    from sddx.export.formats import runtimes
    from sddx.models.families import FAMILIES
    from sddx.models.structure import layout
    from sddx.records import Cut
    from sddx.students.trial import try_out
    from sddx.training.trial import try_step
    from sddx.training.tuning import lora

    config = _config(name)
    attention, model = _first_that_runs(config)
    try_out(config, Cut.without({0, DEPTH // 2}, DEPTH), attention)
    return Row(
        family=name,
        blocks=layout(model).blocks,
        attention=attention,
        branches=config.get_text_config().model_type in FAMILIES,
        adapted=tuple(try_step(config, lora, attention)),
        exports=runtimes(type(model).__name__),
    )


def _first_that_runs(config: Any) -> tuple[str, Any]:
    """The first way of attending that the family knows, and a narrow model of it. Raises UserError where it knows
    none."""
    from sddx.students.trial import small_model

    *others, last = ATTENTIONS
    for attention in others:
        with suppress(UserError):
            return attention, small_model(config, attention)
    return last, small_model(config, last)


def _config(name: str) -> Any:
    """The family's own default settings, with fewer blocks."""
    from transformers import CONFIG_MAPPING

    from sddx.models.narrow import refusals

    kind = CONFIG_MAPPING[name]
    try:
        if "text_config" in kind.sub_configs:
            return kind(text_config={"num_hidden_layers": DEPTH})
        return kind(**{"num_hidden_layers": DEPTH, **SETTINGS.get(name, {})})
    except refusals() as error:
        raise UserError(f"it has no settings by default: {' '.join(str(error).split())[:200]}") from error


if __name__ == "__main__":
    sys.exit(main())
