"""The recipe of the embedded model: `python -m sddx.tiny.pretrain out=my_model`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice, zip_longest
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from sddx.config import CONF, flatten
from sddx.runtime import Runtime
from sddx.tiny.corpus import documents
from sddx.tiny.dice import Dice
from sddx.tiny.vocabulary import build_tokenizer


@dataclass(frozen=True)
class Row:
    """One document as token ids; the first `given` of them are the prompt."""

    ids: list[int]
    given: int


class Corpus:
    """The optimiser steps of pretraining, and `digest`: the hash of every byte of text that went into them.

    Documents are sorted by length within a pool and cut into micro-batches, so that little is padding. A step
    holds one micro-batch of short, one of middling and one of long documents: steps of one length would be
    steps of one skill, which pull the weights to and fro.
    """

    def __init__(self, tokenizer: Any, *, total: int, pool: int, tokens: int, seed: int) -> None:
        self.tokenizer, self.total, self.pool, self.tokens, self.seed = tokenizer, total, pool, tokens, seed
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[list[list[Row]]]:
        """Steps, each a list of micro-batches of at most `tokens` tokens, padding included."""
        stream = documents("pretrain", self.total, self.seed)
        for number in count():
            texts = list(islice(stream, self.pool))
            if not texts:
                return
            parts = self._micro_batches(sorted(self._encode(texts), key=lambda row: len(row.ids)))
            third = -(-len(parts) // 3)
            dice = Dice(f"batches/{self.seed}/{number}")
            thirds = [dice.shuffled(parts[at : at + third]) for at in (0, third, 2 * third)]
            for step in zip_longest(*thirds):
                yield [part for part in step if part]

    def _encode(self, texts: list[tuple[str, str]]) -> Iterator[Row]:
        for given, answered in texts:
            self.digest.update(f"{given}{answered}\n".encode())
        given = self.tokenizer([text for text, _ in texts], add_special_tokens=False)["input_ids"]
        answered = self.tokenizer([text for _, text in texts], add_special_tokens=False)["input_ids"]
        return (Row(first + second, len(first)) for first, second in zip(given, answered, strict=True))

    def _micro_batches(self, rows: list[Row]) -> list[list[Row]]:
        parts: list[list[Row]] = [[]]
        for row in rows:
            if len(row.ids) * (len(parts[-1]) + 1) > self.tokens:
                parts.append([])
            parts[-1].append(row)
        return parts


def collate(rows: list[Row], prompt_weight: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, targets and loss weights, all [batch, time]. Padding stands on the right, where a causal model never
    looks, so that no attention mask is needed."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    weights = torch.zeros(len(rows), width)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        weights[number, : row.given] = prompt_weight
        weights[number, row.given : len(row.ids)] = 1.0
    return ids[:, :-1], ids[:, 1:], weights[:, 1:]


def backward(model: Any, step: list[list[Row]], prompt_weight: float, precision: torch.dtype) -> float:
    """Gradients of the weighted mean of the next-token cross-entropy over one step; returns the loss."""
    parts = [collate(rows, prompt_weight) for rows in step]
    total = sum(weights.sum() for _, _, weights in parts)
    loss = 0.0
    for ids, targets, weights in parts:
        kept = weights > 0
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            hidden = model.model(ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[kept])
        losses = torch.nn.functional.cross_entropy(logits.float(), targets[kept], reduction="none")
        share = (losses * weights[kept]).sum() / total
        share.backward()
        loss += share.item()
    return loss


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz steps, for matrices (Jordan et al., 2024).

    torch.optim.Muon does those steps in bfloat16, which CPUs without bfloat16 arithmetic emulate a hundred
    times slower; here they run in the weights' own dtype, matrices of one shape together.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
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
    """A Llama model of this shape with fresh weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **shape,
    )
    return LlamaForCausalLM(config)


def optimisers(model: Any, cfg: DictConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    adam = torch.optim.AdamW(others, lr=cfg.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=cfg.matrix_learning_rate), adam]


def train(model: Any, corpus: Corpus, cfg: DictConfig, progress: Any) -> None:
    """One pass over the corpus; gradients are clipped at norm 1."""
    seen, precision, smooth = 0, getattr(torch, cfg.precision), None
    chosen = optimisers(model, cfg)
    peaks = [optimiser.param_groups[0]["lr"] for optimiser in chosen]
    for step in corpus:
        loss = backward(model, step, cfg.prompt_weight, precision)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = rate_at((seen + 1) / cfg.documents, warmup=cfg.warmup, decay=cfg.decay)
        for optimiser, peak in zip(chosen, peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        done = sum(len(rows) for rows in step)
        seen += done
        smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
        progress.update(done)
        progress.set_postfix(loss=f"{smooth:.3f}", refresh=False)


def save(model: Any, tokenizer: Any, out: Path, card: str) -> None:
    """Weights in bfloat16, tokenizer and card, written beside `out` and then renamed."""
    partial = out.with_name(out.name + ".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card)
    os.rename(partial, out)


def card(model: Any, corpus: Corpus, cfg: DictConfig) -> str:
    """The model card: what it is, the hash of what it read, the settings that made it."""
    recipe = {key: value for key, value in flatten(OmegaConf.to_container(cfg)).items() if key != "out"}  # type: ignore[arg-type]
    settings = "\n".join(f"- {key}: {value}" for key, value in recipe.items())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"""---
license: apache-2.0
---
# The tiny model of sddx

A Llama of {cfg.model.num_hidden_layers} blocks and {parameters:,} parameters that knows eight skills of a made-up
world. Made by `python -m sddx.tiny.pretrain` from {cfg.documents:,} generated conversations.

sha256 of every document in order: `{corpus.digest.hexdigest()}`

## Recipe

{settings}
"""


@hydra.main(version_base=None, config_path=str(CONF), config_name="pretrain")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    out = Path(cfg.out).resolve()
    if out.exists():
        raise SystemExit(f"{out} exists already. Name another folder with out=..., or remove it first.")
    tokenizer = build_tokenizer()
    model = new_model(tokenizer, OmegaConf.to_container(cfg.model), cfg.seed)  # type: ignore[arg-type]
    corpus = Corpus(tokenizer, total=cfg.documents, pool=cfg.pool, tokens=cfg.tokens_per_micro_batch, seed=cfg.seed)
    with Runtime().progress(total=cfg.documents, what="pretraining", unit="document") as progress:
        train(model, corpus, cfg, progress)
    save(model, tokenizer, out, card(model, corpus, cfg))
    print(f"saved to {out}")


if __name__ == "__main__":
    main()
