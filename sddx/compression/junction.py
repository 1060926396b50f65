"""The junction: patches put into a pruned model, folded into its weights, kept on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sddx.compression import patches
from sddx.compression.choose import NOT_FOLDABLE
from sddx.compression.compressed import Compressed, Compression
from sddx.errors import UserError
from sddx.models.anatomy import FAMILIES, Family, bare, blocks, decoder, family, part, set_blocks, stack, twin
from sddx.models.outputs import entering, first, with_state
from sddx.records import Cut, Units

WEIGHTS, RECORD = "junction.safetensors", "junction.json"
BLOCK = "block"  # in the record: a patch that is a block of the model's own kind


NEEDS_BLOCKS = (
    "this patch works on the block before the removed ones, and where branches are removed there is none. Use "
    "pruning.units=blocks, or pruning/patch=linear or mean with pruning.patch.fold=false."
)


NO_BIAS = (
    "a constant update cannot be folded into a {} model: its feed-forward branch has no bias, and its config no "
    "setting for one. Set pruning.patch.fold=false, or use pruning/patch=linear_ffn."
)


@dataclass(frozen=True)
class Gap:
    """A removed part: blocks `start` to `end` - 1 of the unpruned model, or one branch of the block `start`."""

    kind: str
    start: int
    end: int

    @property
    def name(self) -> str:
        """What a patch for this gap is kept under."""
        return f"{self.kind}-{self.start}-{self.end}"


def gaps(cut: Cut) -> list[Gap]:
    """What the cut removed, in the order of the blocks."""
    removed = [Gap("blocks", start, end) for start, end in cut.spans]
    removed += [Gap("attention", block, block + 1) for block in cut.no_attention]
    removed += [Gap("feedforward", block, block + 1) for block in cut.no_feedforward]
    return sorted(removed, key=lambda gap: (gap.start, gap.kind))


@dataclass(frozen=True)
class Junction(Compression):
    """The patches of a cut, one for each gap: a `Patch`, or the weights of a whole block. `trained`: they go on
    learning with the student. `fold`: they are worked into weights that the model has already."""

    patches: dict[Gap, Any] = field(default_factory=dict)
    trained: bool = False
    fold: bool = False

    def save(self, folder: Path) -> None:
        """Write the weights (float32) and what they are."""
        weights: dict[str, Tensor] = {}
        record = []
        for gap, patch in self.patches.items():
            record.append({**asdict(gap), "patch": _kind(patch)})
            state = patch if isinstance(patch, Mapping) else patch.state_dict()
            weights |= {f"{gap.name}.{name}": value.float().contiguous().cpu() for name, value in state.items()}
        save_file(weights, folder / WEIGHTS)
        about = {"trained": self.trained, "fold": self.fold, "gaps": record}
        (folder / RECORD).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Junction:
        """What `save` wrote."""
        about, weights = json.loads((folder / RECORD).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
        by_gap: dict[Gap, Any] = {}
        for entry in about["gaps"]:
            kind = entry.pop("patch")
            gap = Gap(**entry)
            own = {n.removeprefix(f"{gap.name}."): w for n, w in weights.items() if n.startswith(f"{gap.name}.")}
            by_gap[gap] = own if kind == BLOCK else getattr(patches, kind)(**own)
        return cls(by_gap, about["trained"], about["fold"])

    @property
    def is_stock(self) -> bool:
        """Whether they are folded into weights that are there, or are blocks of the model's own kind."""
        return self.fold or all(_kind(patch) == BLOCK for patch in self.patches.values())

    def apply(self, made: Compressed) -> None:
        """Raises UserError where a patch cannot stand there, or cannot be folded."""
        made.own |= attach(made.model, made.cut, self)

    def thaw(self, made: Compressed) -> None:
        """The patches learn where `trained` says so."""
        for weight in self._own(made).values():
            weight.requires_grad_(self.trained)

    def keep(self, made: Compressed, folder: Path) -> None:
        """Write the weights of the patches as they are now; where they were folded there are none."""
        if own := self._own(made):
            tensors = {name: weight.detach().float().cpu().contiguous() for name, weight in own.items()}
            save_file(tensors, folder / WEIGHTS)

    def restore(self, made: Compressed, folder: Path) -> None:
        """Raises UserError where the weights are not those of these patches."""
        if not (own := self._own(made)):
            return
        stored = load_file(folder / WEIGHTS)
        if stored.keys() != own.keys():
            raise UserError(f"the patch in {folder} belongs to another cut or is of another kind. Train it again.")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(stored[name])

    def _own(self, made: Compressed) -> Attached:
        gaps = {gap.name for gap in self.patches}
        return {name: weight for name, weight in made.own.items() if name.partition(".")[0] in gaps}


def _kind(patch: Any) -> str:
    return BLOCK if isinstance(patch, Mapping) else type(patch).__name__


Attached = dict[str, nn.Parameter]  # the weights of patches inside a student, by gap and name


def attach(model: Any, cut: Cut, junction: Junction) -> Attached:
    """Put the patches into a model that the cut was applied to (in place), as modules of twins of its blocks:
    the unpruned blocks, which a shared teacher runs, stay without. With `fold` they become part of existing
    weights instead. Returns the weights of what was put in; none where it was folded.

    Raises UserError where a patch cannot stand there, or cannot be folded.
    """
    attached: Attached = {}
    for gap, patch in junction.patches.items():
        if junction.fold:
            _fold(model, cut, gap, patch)
            continue
        module = _insert(model, cut, gap, patch)
        attached |= {f"{gap.name}.{name}": weight for name, weight in module.named_parameters()}
    set_blocks(model, stack(model))  # a block that was put in needs its index
    return attached


def _insert(model: Any, cut: Cut, gap: Gap, patch: Any) -> nn.Module:
    student, device = blocks(model), next(model.parameters()).device
    if isinstance(patch, Mapping):
        place = before_gap(cut, gap)
        light = deepcopy(student[place])
        light.load_state_dict(patch)
        student[place] = light.requires_grad_(False)
        return light
    patch = patch.to(device)
    if gap.kind != "blocks":
        core = getattr(family(model), gap.kind).core
        getattr(student[cut.kept.index(gap.start)], core).patch = patch
    elif isinstance(patch, patches.FeedForwardMap):
        written = _own_part(model, cut, gap, family(model).written)
        written.junction = patch
        written.register_forward_hook(_through)
    elif gap.end < cut.total:
        follower = _own_block(student, cut.kept.index(gap.end))
        follower.junction = patch
        follower.register_forward_pre_hook(_into, with_kwargs=True)
    else:
        last = _own_block(student, len(student) - 1)
        last.tail_junction = patch
        last.register_forward_hook(_out_of)
    return patch


def before_gap(cut: Cut, gap: Gap) -> int:
    """The student's block before the junction. Raises UserError where there is none."""
    if gap.kind != "blocks":
        raise UserError(NEEDS_BLOCKS)
    if gap.start == 0:
        raise UserError(
            "this patch works on the block before the removed ones, and block 0 has none before it. Use "
            "pruning/patch=linear, or another cut."
        )
    return cut.kept.index(gap.start - 1)


def _own_block(student: nn.ModuleList, place: int) -> Any:
    """The student's block, as a twin that may be given something of its own."""
    student[place] = twin(student[place])
    return student[place]


def _own_part(model: Any, cut: Cut, gap: Gap, path: str) -> Any:
    """A twin of a module of the block before the junction, in its place."""
    place = before_gap(cut, gap)
    if gap.start - 1 in cut.no_feedforward or part(blocks(model)[place], path) is None:
        raise UserError(
            f"this patch works on {path} of block {gap.start - 1}, which a {type(bare(model)).__name__} with this "
            "cut does not have. Use pruning/patch=linear."
        )
    module = _own_block(blocks(model), place)
    for name in path.split("."):
        setattr(module, name, twin(getattr(module, name)))
        module = getattr(module, name)
    return module


def _through(module: Any, arguments: tuple, output: Tensor) -> Tensor:
    return module.junction(output)


def _into(block: Any, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return with_state(block.junction(entering(arguments, named)), arguments, named)


def _out_of(block: Any, arguments: tuple, output: Any) -> Any:
    patched = block.tail_junction(first(output))
    return patched if isinstance(output, Tensor) else (patched, *output[1:])


def require_patch(model_type: str, units: Units, chosen: Any) -> None:
    """Raises UserError where the patch that was chosen (`pruning.patch`) cannot stand in for these units, or cannot
    be folded into the weights of this family. What depends on the weights is found when it is put in."""
    if units.granularity != "blocks" and (chosen.fold or chosen.fit.reads != "stream"):
        raise UserError(NEEDS_BLOCKS)
    if chosen.fit.reads == "feedforward":
        known_feed_forward(model_type)
    if chosen.fold:
        layout = _foldable(model_type)
        if chosen.fit.name == "mean" and not (layout.has_bias or layout.bias_setting):
            raise UserError(NO_BIAS.format(model_type))


def known_feed_forward(model_type: str) -> Family:
    """What the feed-forward branches of this family are made of. Raises UserError where no table says: a norm or a
    factor may stand between a layer of the usual name and the residual stream."""
    if model_type not in FAMILIES:
        raise UserError(
            f"what the feed-forward branch of a {model_type} model adds to the residual stream is not known "
            "(sddx.models.families.FAMILIES), so that nothing can be fitted to it or folded into it. Use "
            "pruning/patch=linear, or mean with pruning.patch.fold=false."
        )
    return FAMILIES[model_type]


def _foldable(model_type: str) -> Family:
    known = known_feed_forward(model_type)
    if post := known.feedforward.post:
        raise UserError(
            f"nothing can be folded into a {model_type} model: a norm ({post}) stands between its feed-forward "
            "weights and the residual stream. Set pruning.patch.fold=false."
        )
    return known


def _fold(model: Any, cut: Cut, gap: Gap, patch: Any) -> None:
    """Work a patch into the last linear layer of the feed-forward branch before the junction: exactly the same
    function. Raises UserError, with the reason, where it is not."""
    if not isinstance(patch, (patches.Shift, patches.FeedForwardMap)):
        raise UserError(NOT_FOLDABLE)
    _foldable(decoder(model).config.model_type)
    linear = _own_part(model, cut, gap, family(model).last_linear)
    bias = linear.bias
    if isinstance(patch, patches.FeedForwardMap):
        matrix = patch.matrix.double().to(linear.weight.device)
        linear.weight = _like(linear.weight, matrix.T @ linear.weight.double())
        linear.bias = None if bias is None else _like(bias, bias.double() @ matrix)
        return
    if bias is None:
        _give_biases(model)
        linear = part(blocks(model)[before_gap(cut, gap)], family(model).last_linear)
    linear.bias = _like(linear.bias, linear.bias.double() + patch.bias.double().to(linear.weight.device))


def _give_biases(model: Any) -> None:
    """Zero biases for all linear layers of the feed-forward branches, where the config has a setting for them."""
    setting = family(model).bias_setting
    if setting is None:
        raise UserError(NO_BIAS.format(decoder(model).config.model_type))
    setattr(decoder(model).config, setting, True)
    branch = family(model).feedforward.core
    for place, block in enumerate(blocks(model)):
        made = twin(block)
        setattr(made, branch, twin(getattr(block, branch)))
        for name, module in getattr(block, branch).named_children():
            if isinstance(module, nn.Linear) and module.bias is None:
                with_bias = twin(module)
                with_bias.bias = nn.Parameter(module.weight.new_zeros(module.out_features), requires_grad=False)
                setattr(getattr(made, branch), name, with_bias)
        blocks(model)[place] = made


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.to(old.dtype), requires_grad=old.requires_grad)
