"""Training against a bare PyTorch loop: `python benchmarks/training.py`.

The same model, adapter, optimiser and batches, five alternating pairs; prints tokens per second of both and
the median of the five ratios.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from sddx.compression.remove import apply_cut
from sddx.data.checkers import last_number
from sddx.data.encode import collate, encode_all, padding_id
from sddx.models.load import load_model, load_tokenizer
from sddx.records import Cut
from sddx.runtime import Runtime
from sddx.tiny import data
from sddx.training.batches import plan
from sddx.training.fit import Fit
from sddx.training.losses import cross_entropy
from sddx.training.objective import Objective, Supervised
from sddx.training.tuning import lora

CHECKPOINT = Path(data.__file__).parent / "checkpoint"
CUT = Cut.without(range(6, 9), 12)
STEPS, BATCH, RATE = 60, 16, 1e-3


def student():
    model = load_model(CHECKPOINT)
    apply_cut(model, CUT)
    return lora(model, 0, rank=8, alpha=16)


def ours(rows, pad: int) -> float:
    objective = Objective(
        data="reference", terms={"cross_entropy": Supervised(loss=partial(cross_entropy), weight=1.0)}
    )
    with tempfile.TemporaryDirectory() as out:
        fit = Fit(budget="steps", steps=STEPS, batch_size=BATCH, learning_rate=RATE)
        found = fit(student(), None, objective, CUT, rows, [], pad, 0, Path(out), Runtime(quiet=True))
    return found["tokens_per_second"]


def bare(rows, pad: int) -> float:
    """The shortest loop that trains: whole logits, mean loss, clip, step."""
    model = student().train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=True)
    steps = plan(rows, 0, batch_size=BATCH, budget="steps", steps=STEPS)
    start, tokens = time.perf_counter(), 0
    for step in steps:
        batch = collate([rows[row] for row in step.micro_batches[0]], pad)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        tokens += int(batch.attention_mask.sum())
    return tokens / (time.perf_counter() - start)


def main() -> None:
    torch.set_num_threads(2)
    tokenizer = load_tokenizer(CHECKPOINT)
    examples = data.dataset(
        skill="arithmetic", shift=1.0, size=STEPS * BATCH, seed=0, check=last_number, rewrite="tiny", trains=[]
    ).examples
    rows, _ = encode_all(tokenizer, examples, max_length=512)
    pad = padding_id(tokenizer)
    pairs = [(ours(rows, pad), bare(rows, pad)) for _ in range(5)]
    for mine, other in pairs:
        print(f"sddx {mine:8,.0f} tokens/s   bare {other:8,.0f} tokens/s   ratio {mine / other:.2f}")
    print(f"median ratio {statistics.median(mine / other for mine, other in pairs):.2f}")


if __name__ == "__main__":
    main()
