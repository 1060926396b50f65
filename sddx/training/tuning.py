"""Which parameters of the student are trained: a LoRA adapter (on a base in 4 bit, if asked), or all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import get_object
from torch import nn

from sddx.config.build import build, tried
from sddx.errors import UserError
from sddx.models.anatomy import bare
from sddx.models.structure import layout
from sddx.records import Count, Positive, Share

if TYPE_CHECKING:
    from peft import PeftModel


def lora(
    model: nn.Module,
    seed: int,
    *,
    rank: Count = 8,
    alpha: Positive = 16,
    dropout: Share = 0.0,
    targets: str | list[str] = "all-linear",
) -> PeftModel:
    """Puts a LoRA adapter (2106.09685), scaled by alpha / rank, on the linear layers named in `targets`.

    `all-linear` means every linear map but the head and routers, those of fused experts among them. The initial
    adapter is a function of the seed and is float32 even on a bfloat16 base. The base weights are frozen. Raises
    UserError as `require_adapter` does.
    """
    from peft import LoraConfig, get_peft_model

    require_adapter(model, rank=rank, dropout=dropout, targets=targets)
    places = _places(model, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, task_type="CAUSAL_LM", **places)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config, autocast_adapter_dtype=True)


def qlora(
    model: nn.Module,
    seed: int,
    *,
    quantization: dict[str, Any],
    rank: Count = 8,
    alpha: Positive = 16,
    dropout: Share = 0.0,
    targets: str | list[str] = "all-linear",
) -> PeftModel:
    """`lora` on a base whose linear layers are in 4 bit (2305.14314).

    `quantization` says how (`sddx.models.load.four_bit`) and is applied when the base is loaded for training, to
    all blocks: a shared teacher is the unpruned model in 4 bit too. The saved adapter is an ordinary one, and is
    evaluated on the base in its own dtype. Raises UserError as `lora` does, and where packed weights would have
    to be adapted beside experts; ValueError where the base was not loaded so.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        raise ValueError(f"the base is to be loaded with quantization={quantization}")
    weights = _places(model, targets).get("target_parameters", [])
    if packed := [name for name in weights if name.endswith(".weight")]:
        raise UserError(
            f"tuning.targets: {', '.join(packed)} are in 4 bit beside fused experts, where they cannot be adapted. "
            "Use tuning=lora, or name layers of the attention: tuning.targets=[q_proj,v_proj]."
        )
    return lora(model, seed, rank=rank, alpha=alpha, dropout=dropout, targets=targets)


def full(model: nn.Module, seed: int) -> nn.Module:
    """Trains every parameter. Nothing is drawn: the seed is there because every tuning is called with one."""
    return model.requires_grad_(True)


def require_adapter(
    model: nn.Module, *, rank: int = 8, dropout: float = 0.0, targets: str | list[str] = "all-linear"
) -> None:
    """Raises UserError where a target names no linear map of the model, or one that shares its weights; where no
    weight is as large as the rank; where the dropout leaves nothing, or experts, which have none, are adapted. All
    mistakes at once."""
    maps, chosen = _maps(model), set(_chosen(model, targets))
    wrong = [*_wrong_targets(maps, targets), *_tied(model, chosen)]
    largest = max((min(shape[-2:]) for name, shape in maps.items() if kind(name) in chosen), default=rank)
    if rank > largest:
        wrong.append(
            f"tuning.rank={rank} is more than any adapted weight of this model can use: {largest}. Lower it."
        )
    if dropout >= 1:
        wrong.append(f"tuning.dropout={dropout} drops everything, and nothing would be trained. Give less than 1.")
    elif dropout and _places(model, targets).get("target_parameters"):
        wrong.append(
            f"tuning.dropout={dropout} cannot be had in a feed-forward branch with fused experts. Set "
            "tuning.dropout=0, or name layers of the attention: tuning.targets=[q_proj,v_proj]."
        )
    if wrong:
        raise UserError(*wrong)


def _wrong_targets(maps: dict[str, torch.Size], targets: str | list[str]) -> list[str]:
    if targets == "all-linear":
        return []
    if not targets:
        return ["tuning.targets is empty. Name linear layers, or use tuning.targets=all-linear."]
    known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in maps}))
    unknown = [target for target in _listed(targets) if not any(_is_named(name, target) for name in maps)]
    return [f"tuning.targets: no linear layer is named {target!r}; there are {known}." for target in unknown]


def _tied(model: nn.Module, chosen: set[str]) -> list[str]:
    """What is wrong with chosen weights that another part of the model uses too: an adapter would change one use
    alone, and is not found again where the model is saved."""
    owners: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), []).append(name.removesuffix(".weight"))
    return [
        f"tuning.targets: {name} has the weights of {' and '.join(other for other in names if other != name)} "
        "(tied embeddings), and an adapter would part them. Leave it out, or use tuning=full."
        for names in owners.values()
        for name in names
        if len(names) > 1 and kind(name) in chosen
    ]


def _listed(targets: str | list[str]) -> list[str]:
    return [targets] if isinstance(targets, str) else list(targets)


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def kind(name: str) -> str:
    """The name of a module or weight without the number of its block: `self_attn.q_proj`, `mlp.experts.down_proj`,
    `lm_head`."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _maps(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of the language model's linear maps by the names of their layers; of fused experts
    [experts, .., ..] by the names of their weights."""
    from transformers.pytorch_utils import Conv1D

    shapes: dict[str, torch.Size] = {}
    for name, module in model.named_modules():
        if re.fullmatch(_outside(model), name):
            continue
        if isinstance(module, nn.Linear):
            shapes[name] = torch.Size((module.out_features, module.in_features))  # in 4 bit the weight has another
        elif isinstance(module, Conv1D):  # GPT-2's own linear layer
            shapes[name] = module.weight.shape
        elif "experts" in f"{name}.{type(module).__name__}".lower():
            own = module.named_parameters(recurse=False)
            shapes |= {f"{name}.{weight}": value.shape for weight, value in own if value.dim() == 3}
    return shapes


def _outside(model: nn.Module) -> str:
    """A pattern of the names of modules that are neither in the body nor the head: towers for images and sound."""
    places = layout(bare(model))
    return rf"(?!{re.escape(places.body)}\.|{re.escape(places.head)}$).*"


def _chosen(model: nn.Module, targets: str | list[str]) -> list[str]:
    """The kinds of linear maps that are adapted."""
    kinds, head = list(dict.fromkeys(map(kind, _maps(model)))), kind(layout(bare(model)).head)
    if targets != "all-linear":
        return [each for each in kinds if any(_is_named(each, target) for target in _listed(targets))]
    return [each for each in kinds if each != head and not _routes(each)]


def _routes(name: str) -> bool:
    """Whether a linear layer of this kind weighs experts."""
    return any("router" in part or part == "gate" or part.endswith("_gate") for part in name.split("."))


def _places(model: nn.Module, targets: str | list[str]) -> dict[str, list[str] | str]:
    """What peft is told. What reads no text stays without an adapter. Beside fused experts peft takes the names of
    a feed-forward branch's layers for theirs, as checkpoints had them before experts were fused, and leaves the
    layers out; so weights are named there."""
    from transformers.pytorch_utils import Conv1D

    maps, kinds = _maps(model), _chosen(model, targets)
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    apart: dict[str, Any] = {"exclude_modules": _outside(model)} if linear - maps.keys() else {}
    fused = {kind(name) for name, shape in maps.items() if len(shape) == 3}
    if not fused:
        return apart | {"target_modules": "all-linear" if targets == "all-linear" else _listed(targets)}
    branches = {each.split(".")[0] for each in fused}
    inside = [each for each in kinds if each.split(".")[0] in branches]
    weights = [each if each in fused else f"{each}.weight" for each in inside]
    return apart | {"target_modules": [each for each in kinds if each not in inside], "target_parameters": weights}


def coverage(model: nn.Module) -> tuple[list[str], list[str]]:
    """The kinds of weights (matrices, and stacks of them) of a model that have an adapter, and those that have
    none."""
    adapted = set()
    for name, module in model.named_modules():
        if getattr(module, "lora_A", None):
            adapted.add(f"{name}.{getattr(module, 'parameter_name', 'weight')}".replace(".base_layer", ""))
    kinds: tuple[dict[str, None], dict[str, None]] = {}, {}
    for name, weight in model.named_parameters():
        plain = name.replace(".base_layer", "")
        if weight.dim() > 1 and "lora_" not in name:
            adapted_weights = kind(plain.removeprefix("base_model.model.")).removesuffix(".weight")
            kinds[plain not in adapted][adapted_weights] = None
    return list(kinds[0]), list(kinds[1])


def adapted_weights(model: nn.Module) -> str:
    """In words, what of a model is adapted and what is not."""
    adapted, left = coverage(model)
    return f"Adapter on {', '.join(adapted)}; none on {', '.join(left)}." if adapted else "All weights are trained."


def require_tuning(node: Mapping[str, Any], model: Callable[[], nn.Module]) -> None:
    """Raises UserError where a tuning that is not of this module does not give a model with something to train,
    tried on one without weights."""
    target = get_object(node["_target_"])
    if target.__module__ == __name__:
        return
    with torch.device("meta"):
        student = tried("tuning", build(node), model(), 0)
    if not isinstance(student, nn.Module) or not any(weight.requires_grad for weight in student.parameters()):
        raise UserError(f"tuning._target_={node['_target_']} gives no model that has something to train.")
