"""The recipe of the embedded model: `python -m sddx.tiny.pretrain out=my_model`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

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
    """The batches of pretraining, and `digest`: the hash of every byte of text that went into them so far."""

    def __init__(self, tokenizer: Any, *, total: int, pool: int, tokens_per_batch: int, seed: int) -> None:
        self.tokenizer, self.total, self.pool, self.seed = tokenizer, total, pool, seed
        self.tokens_per_batch = tokens_per_batch
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[list[Row]]:
        """Batches of rows of like length, in random order within each pool."""
        stream = documents("pretrain", self.total, self.seed)
        number = 0
        while pool := list(islice(stream, self.pool)):
            rows = sorted(self._encode(pool), key=lambda row: len(row.ids))
            yield from Dice(f"batches/{self.seed}/{number}").shuffled(self._batches(rows))
            number += 1

    def _encode(self, pool: list[tuple[str, str]]) -> Iterator[Row]:
        for given, answered in pool:
            self.digest.update(f"{given}{answered}\n".encode())
        given = self.tokenizer([text for text, _ in pool], add_special_tokens=False)["input_ids"]
        answered = self.tokenizer([text for _, text in pool], add_special_tokens=False)["input_ids"]
        return (Row(first + second, len(first)) for first, second in zip(given, answered, strict=True))

    def _batches(self, rows: list[Row]) -> list[list[Row]]:
        batches: list[list[Row]] = [[]]
        for row in rows:
            if len(row.ids) * (len(batches[-1]) + 1) > self.tokens_per_batch:
                batches.append([])
            batches[-1].append(row)
        return batches


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


def loss_of(model: Any, rows: list[Row], prompt_weight: float, precision: torch.dtype) -> torch.Tensor:
    """Weighted mean of the next-token cross-entropy over one batch."""
    ids, targets, weights = collate(rows, prompt_weight)
    kept = weights > 0
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        hidden = model.model(ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[kept])
    losses = torch.nn.functional.cross_entropy(logits.float(), targets[kept], reduction="none")
    return (losses * weights[kept]).sum() / weights[kept].sum()


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


def train(model: Any, corpus: Corpus, cfg: DictConfig, progress: Any) -> None:
    """One pass over the corpus with AdamW; gradients are clipped at norm 1."""
    optimiser = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=cfg.weight_decay, fused=True
    )
    seen, precision, smooth = 0, getattr(torch, cfg.precision), None
    for rows in corpus:
        for group in optimiser.param_groups:
            group["lr"] = cfg.learning_rate * rate_at(seen / cfg.documents, warmup=cfg.warmup, decay=cfg.decay)
        loss = loss_of(model, rows, cfg.prompt_weight, precision)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seen += len(rows)
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        progress.update(len(rows))
        progress.set_postfix(loss=f"{smooth:.3f}", refresh=False)


def save(model: Any, tokenizer: Any, out: Path, card: str) -> None:
    """Weights in bfloat16, tokenizer and card, written beside `out` and then renamed."""
    partial = out.with_name(out.name + ".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card)
    os.rename(partial, out)


def card(model: Any, corpus: Corpus, cfg: DictConfig) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"""---
license: apache-2.0
---
# The tiny model of sddx

A Llama of {cfg.model.num_hidden_layers} blocks and {parameters:,} parameters that knows eight skills of a made-up
world. Made by `python -m sddx.tiny.pretrain` from {cfg.documents:,} generated conversations.

- Corpus, sha256 of every document in order: `{corpus.digest.hexdigest()}`
- Recipe: `{OmegaConf.to_container(cfg)}`
"""


@hydra.main(version_base=None, config_path=str(Path(__file__).parents[2] / "conf"), config_name="pretrain")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    out = Path(cfg.out).resolve()
    if out.exists():
        raise SystemExit(f"{out} exists already. Name another folder with out=..., or remove it first.")
    tokenizer = build_tokenizer()
    model = new_model(tokenizer, OmegaConf.to_container(cfg.model), cfg.seed)  # type: ignore[arg-type]
    corpus = Corpus(
        tokenizer, total=cfg.documents, pool=cfg.pool, tokens_per_batch=cfg.tokens_per_batch, seed=cfg.seed
    )
    with Runtime().progress(total=cfg.documents, what="pretraining", unit="document") as progress:
        train(model, corpus, cfg, progress)
    save(model, tokenizer, out, card(model, corpus, cfg))
    print(f"saved to {out}")


if __name__ == "__main__":
    main()
