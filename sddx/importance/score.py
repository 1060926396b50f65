"""Score a model's blocks: one pass over calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from sddx.models.anatomy import decoder
from sddx.models.outputs import block_states
from sddx.records import UserError

Metric = Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]


def score_blocks(
    model: Any,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    metric: Metric,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Mean of the metric over sequences, and its standard error (None for a single sequence).

    `batches` gives (input_ids, attention_mask), both [batch, time]. The head is not run, and nothing is kept
    but two float64 sums. `progress(n)` is called with the number of sequences of each batch done. Returns
    {"mean": nested list, "stderr": nested list, "sequences": int}. Raises UserError where there are no
    sequences, or a score is not finite.
    """
    body, device = decoder(model), next(model.parameters()).device
    count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
    with torch.inference_mode(), block_states(model) as states:
        for input_ids, mask in batches:
            states.clear()
            body(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False)
            values = metric(states, mask.to(device)).cpu().double()
            count += len(values)
            total, squares = total + values.sum(0), squares + values.square().sum(0)
            if not total.isfinite().all():
                raise UserError(
                    "a score is not finite: a calibration sequence has no tokens, or the model overflows in "
                    "this dtype. Drop empty sequences, or score in float32 or bfloat16."
                )
            if progress is not None:
                progress(len(values))
    return _summary(count, total, squares)


def _summary(count: int, total: torch.Tensor, squares: torch.Tensor) -> dict[str, Any]:
    if count == 0:
        raise UserError("no calibration sequences to score blocks on. Give one at least, better hundreds.")
    stderr = None
    if count > 1:
        variance = (squares - total.square() / count).clamp(min=0) / (count - 1)
        stderr = (variance / count).sqrt().tolist()
    return {"mean": (total / count).tolist(), "stderr": stderr, "sequences": count}
