"""The recipe of the embedded model: `sddx pretrain out=my_model`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from sddx.config import CONF, flatten, resolve
from sddx.config.build import build
from sddx.config.entry import command, mistakes_told
from sddx.errors import UserError
from sddx.models.load import load_model, load_tokenizer
from sddx.runtime import Runtime
from sddx.tiny.corpus import documents
from sddx.tiny.recipe import Recipe, recipe
from sddx.tiny.vocabulary import build_tokenizer

GROUP = 4  # documents of like length that share their padding


@dataclass(frozen=True)
class Row:
    """One document as token ids; the first `prompt_tokens` of them are the prompt."""

    ids: list[int]
    prompt_tokens: int


class Corpus:
    """The optimiser steps of pretraining, `tokens` tokens each, and `digest`: the hash of every byte of text that
    went into them. Every step mixes all skills: steps of one skill would pull the weights to and fro."""

    def __init__(self, tokenizer: Any, *, total: int, tokens: int, seed: int) -> None:
        self.tokenizer, self.total, self.tokens, self.seed = tokenizer, total, tokens, seed
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[list[Row]]:
        """The rows, cut into steps."""
        step: list[Row] = []
        for row in self.rows():
            step.append(row)
            if sum(len(row.ids) for row in step) >= self.tokens:
                yield step
                step = []
        if step:
            yield step

    def rows(self) -> Iterator[Row]:
        """The documents in their order."""
        stream = documents("pretrain", self.total, self.seed)
        while texts := list(islice(stream, 512)):  # at a time, because the tokenizer is quick with many
            for prompt, answered in texts:
                self.digest.update(f"{prompt}{answered}\n".encode())
            prompts = self.tokenizer([text for text, _ in texts], add_special_tokens=False)["input_ids"]
            answered = self.tokenizer([text for _, text in texts], add_special_tokens=False)["input_ids"]
            yield from (Row(first + second, len(first)) for first, second in zip(prompts, answered, strict=True))


@dataclass(frozen=True)
class Packed:
    """The documents of a step in one row of tokens, [time] each; `shapes` are the (documents, width) of the
    groups of like length that stand in it one after the other, padded on the right."""

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    shapes: list[tuple[int, int]]


def pack(rows: list[Row], prompt_weight: float) -> Packed:
    """A step for `backward`. Matrices are multiplied with all tokens of a step at once, attention runs group by
    group; on a CPU that is twice as fast as a batch for every length.

    A document counts by the root of its answer's length: by the length itself, worked answers would drown the
    one word on which a short answer turns.
    """
    ordered = sorted(rows, key=lambda row: len(row.ids))
    groups = [_grid(ordered[at : at + GROUP], prompt_weight) for at in range(0, len(ordered), GROUP)]
    ids, targets, weights = (torch.cat([part.flatten() for part in parts]) for parts in zip(*groups, strict=True))
    shapes = [tuple(part.shape) for part, _, _ in groups]
    positions = torch.cat([torch.arange(width).repeat(count) for count, width in shapes])
    return Packed(ids, positions, targets, weights, shapes)


def _grid(rows: list[Row], prompt_weight: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, targets and loss weights of some documents, all [documents, width]."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    weights = torch.zeros(len(rows), width)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        a_token = (len(row.ids) - row.prompt_tokens) ** -0.5
        weights[number, : row.prompt_tokens] = prompt_weight * a_token
        weights[number, row.prompt_tokens : len(row.ids)] = a_token
    return ids[:, :-1], ids[:, 1:], weights[:, 1:]


def grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    shapes: list[tuple[int, int]],
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a packed step, for transformers' attention interface:
    [1, heads, time, head width] to [1, time, heads, head width]. Padding stands on the right, where a causal
    model never looks, so that no mask is needed."""
    sizes = [count * width for count, width in shapes]
    attended = []
    for shape, *parts in zip(
        shapes, *(states[0].split(sizes, dim=1) for states in (query, key, value)), strict=True
    ):
        q, k, v = (part.unflatten(1, shape).transpose(0, 1) for part in parts)
        output = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        attended.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)[None], None


def backward(model: Any, step: Packed, precision: torch.dtype) -> float:
    """Gradients of the weighted mean of the next-token cross-entropy over one step; returns the loss."""
    kept = step.weights > 0
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        states = model.model(step.ids[None], position_ids=step.positions[None], use_cache=False, shapes=step.shapes)
        logits = model.lm_head(states.last_hidden_state[0, kept])
    losses = cross_entropy(logits.float(), step.targets[kept], reduction="none")
    loss = (losses * step.weights[kept]).sum() / step.weights.sum()
    loss.backward()
    return loss.item()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz steps, for matrices (Jordan et al., 2024).

    torch.optim.Muon does those steps in bfloat16, which CPUs without bfloat16 arithmetic emulate a hundred
    times slower; here they run in the weights' own dtype, matrices of one shape together.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step for all weights, those of a shape at once: momentum, made orthogonal."""
        group = self.param_groups[0]
        for shape in dict.fromkeys(weight.shape for weight in group["params"]):
            weights = [weight for weight in group["params"] if weight.shape == shape]
            gradient = torch.stack([weight.grad for weight in weights])
            held = self.state[weights[0]].setdefault("momentum", torch.zeros_like(gradient))
            held.mul_(group["momentum"]).add_(gradient)
            update = orthogonal(gradient.add(held, alpha=group["momentum"]))
            update *= max(1.0, shape[0] / shape[1]) ** 0.5
            for weight, change in zip(weights, update, strict=True):
                weight.mul_(1 - 0.01 * group["lr"]).add_(change, alpha=-group["lr"])


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Each of [n, rows, columns] with its singular values pushed towards 1, by five quintic Newton-Schulz
    steps with Muon's published coefficients."""
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def rate_at(progress: float, *, warmup: float, decay: float) -> float:
    """The share of the peak learning rate: linear warm-up, constant, linear decay to zero."""
    return max(0.0, min(1.0, progress / warmup, (1 - progress) / decay))


def new_model(tokenizer: Any, shape: dict[str, Any], seed: int) -> Any:
    """A Llama model of this shape with fresh weights, which reads packed steps."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("grouped", grouped_attention)

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attn_implementation="grouped",
        **shape,
    )
    return LlamaForCausalLM(config)


def optimisers(model: Any, asked: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    adam = torch.optim.AdamW(others, lr=asked.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=asked.matrix_learning_rate), adam]


def train(model: Any, corpus: Corpus, asked: Recipe, progress: Any) -> None:
    """One pass over the corpus; gradients are clipped at norm 1."""
    seen, precision, smooth = 0, getattr(torch, asked.precision), None
    chosen = optimisers(model, asked)
    peaks = [optimiser.param_groups[0]["lr"] for optimiser in chosen]
    for step in corpus:
        loss = backward(model, pack(step, asked.prompt_weight), precision)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = rate_at((seen + 1) / asked.documents, warmup=asked.warmup, decay=asked.decay)
        for optimiser, peak in zip(chosen, peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        seen += len(step)
        smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
        progress.update(len(step))
        progress.set_postfix(loss=f"{smooth:.3f}", refresh=False)


def save(model: Any, tokenizer: Any, out: Path, asked: Recipe, digest: str) -> dict[str, float]:
    """Weights in bfloat16, tokenizer and card, written beside `out` and then renamed. Returns the card's scores:
    those of the model as it is loaded from there."""
    partial = out.with_name(out.name + ".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    results = build(asked.evaluation)(load_model(partial), load_tokenizer(partial), Runtime())
    scores = {task: 100 * record["score"] for task, record in results["tasks"].items()}
    (partial / "README.md").write_text(card(model, scores, asked, digest), encoding="utf-8")
    os.rename(partial, out)
    return scores


def card(model: Any, scores: dict[str, float], asked: Recipe, digest: str) -> str:
    """The model card: what it is, what it can do, the hash of what it read, the settings that made it."""
    settings = flatten({key: value for key, value in asdict(asked).items() if key not in ("out", "evaluation")})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    average = sum(scores.values()) / len(scores)
    return f"""---
license: apache-2.0
---
# The tiny model of sddx

A Llama of {asked.model.num_hidden_layers} blocks and {parameters:,} parameters that knows eight skills of a made-up
world. Made by `sddx pretrain` from {asked.documents:,} generated conversations.

sha256 of every document in order: `{digest}`

## Scores, per cent of the report items

{_listed({task: f"{score:.1f}" for task, score in scores.items()})}
- average: {average:.1f}

## Recipe

{_listed(settings)}
"""


def _listed(values: dict[str, Any]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in values.items())


@hydra.main(version_base=None, config_path=str(CONF), config_name="pretrain")
def main(cfg: DictConfig) -> None:
    """Pretrain an embedded model into a folder."""
    with mistakes_told():
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise UserError("One command makes one model. Leave --multirun out, and give a folder to each: out=...")
        pretrain(recipe(resolve(cfg)))


def pretrain(asked: Recipe) -> None:
    """Make the model of a recipe, and print its scores. Raises UserError where it cannot read its documents."""
    torch.set_num_threads(asked.threads)
    tokenizer = build_tokenizer()
    corpus = Corpus(tokenizer, total=asked.documents, tokens=asked.tokens_per_step, seed=asked.seed)
    require_positions(corpus, asked.model.max_position_embeddings)
    model = new_model(tokenizer, asdict(asked.model), asked.seed)
    with Runtime().progress(total=asked.documents, what="pretraining", unit="document") as progress:
        train(model, corpus, asked, progress)
    out = Path(asked.out).resolve()
    scores = save(model, tokenizer, out, asked, corpus.digest.hexdigest())
    print("\n".join(f"{task}: {score:.1f}" for task, score in scores.items()))
    print(f"saved to {out}")


def require_positions(corpus: Corpus, positions: int) -> None:
    """Raises UserError where the first documents of a corpus are longer than a model of so many positions reads."""
    start = Corpus(corpus.tokenizer, total=corpus.total, tokens=corpus.tokens, seed=corpus.seed)
    longest = max(len(row.ids) for row in islice(start.rows(), 512))
    if longest > positions:
        raise UserError(
            f"model.max_position_embeddings={positions}, and documents have {longest} tokens. Give more."
        )


if __name__ == "__main__":
    command(main, "pretrain")
