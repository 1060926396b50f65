"""Proof that an exported model is the recovered one: the same logits, and the same answers where asked for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from sddx.config.build import build
from sddx.data.encode import encode
from sddx.data.shards import read_examples
from sddx.errors import UserError
from sddx.evaluation.scored import compact
from sddx.models.load import DTYPES, load_tokenizer, text_config
from sddx.report.paired import compare, load_samples
from sddx.run_folder import read_config
from sddx.runtime import Runtime
from sddx.store import manifest
from sddx.students.recovered import Recovered

RANDOM, EXAMPLES, LENGTH = 8, 8, 64  # prompts of random tokens and of the run's own text; their tokens at most
FLOAT32_LIMIT = 1e-4


def prompts(run: Recovered) -> list[list[int]]:
    """Token ids that the models are compared on: random ones, and held-out rows of the run's data set as long as
    they are in the store."""
    config = text_config(run.base)
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (RANDOM, length), generator=generator).tolist()
    prepared = run.artifact("prepare")
    if prepared is None:
        return rows
    examples = read_examples(prepared / "validation.jsonl")[:EXAMPLES]
    encoded = [encode(load_tokenizer(run.base), example, max_length=length) for example in examples]
    return rows + [row.input_ids for row in encoded if row is not None]


def logits(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The model's logits for each row alone, [tokens, vocabulary], float32 or wider, on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0] for row in rows]
    return [each.cpu().to(torch.promote_types(each.dtype, torch.float32)) for each in outputs]


def prove(
    expected: Sequence[torch.Tensor],
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    adapter: str,
    loading: dict[str, str],
) -> dict[str, Any]:
    """How far a model's logits are from those expected: the largest difference at each position (the largest and
    the median of these), and at how many positions the likeliest token is another one (`flipped_greedy_tokens`).

    Raises UserError where rounding does not explain the difference.
    """
    pairs = list(zip(expected, logits(model, rows), strict=True))
    differences = torch.cat([(a - b).abs().amax(-1) for a, b in pairs])
    scale = max(float(each.abs().max()) for each in expected)
    return {
        "adapter": adapter,
        **loading,
        "prompts": len(rows),
        "tokens": len(differences),
        "equal": all(torch.equal(a, b) for a, b in pairs),
        "largest_difference": float(differences.max()),
        "median_difference": float(differences.median()),
        "largest_logit": scale,
        "limit": _require_close(differences, scale, loading["dtype"]),
        "flipped_greedy_tokens": sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in pairs),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "safetensors")},
    }


def _require_close(differences: torch.Tensor, scale: float, name: str) -> float:
    """The limit that these differences keep. In float32: 1e-4 everywhere (of the largest logit, where that is
    above 1). In less precise dtypes: the square root of the dtype's resolution times the largest logit, at the
    median position; far above rounding, far below what a wrong block would do."""
    dtype = DTYPES[name]
    precise = dtype.itemsize >= 4
    limit = FLOAT32_LIMIT * max(1.0, scale) if precise else torch.finfo(dtype).eps ** 0.5 * scale
    judged = float(differences.max() if precise else differences.median())
    if not judged <= limit:  # also where it is not a number
        raise UserError(
            f"the exported model is not the recovered one: its logits differ by {judged:.3g}, and rounding in "
            f"{name} explains {limit:.3g}. Nothing was written. Please report it with the run's summary.json."
        )
    return limit


def require_evaluation(run: Recovered) -> None:
    """Raises UserError where the run's evaluation cannot be repeated here."""
    if _settings(run).get("backend") == "vllm":
        raise UserError(
            "check=eval repeats the run's evaluation in this process, and vLLM did it (evaluation.backend=vllm): "
            "its numbers are not compared with others. Leave check=eval out."
        )
    load_samples(run.folder, run.judged)


def flipped_items(run: Recovered, model: Any, device: str) -> dict[str, dict[str, Any]]:
    """Evaluate a model as the run evaluated its own; per task the items, those that went from right to
    wrong and from wrong to right (None where scores are no yes or no), and the difference of the scores."""
    results = build(_settings(run))(model, load_tokenizer(run.base), Runtime(device=device))
    compared = compare(load_samples(run.folder, run.judged), compact(results))["tasks"]
    return {
        task: {
            "items": len(results["tasks"][task]["samples"]),
            "flipped": comparison["flipped"],
            "difference": comparison["difference"].estimate,
        }
        for task, comparison in compared.items()
    }


def evaluation_of(run: Recovered) -> dict[str, Any] | None:
    """The `evaluation` node of the run; None where the store no longer has its results."""
    place = run.artifact(f"evaluate_{run.judged}")
    fields = manifest.read(place) if place else None
    return fields["spec"]["evaluation"] if fields else None


def _settings(run: Recovered) -> dict[str, Any]:
    """The `evaluation` node of a run that can be repeated. Raises UserError where it cannot."""
    evaluation = evaluation_of(run)
    if evaluation is not None and evaluation.get("data_dir"):  # known by its content there; where it lies is here
        evaluation = {**evaluation, "data_dir": read_config(run.folder)["evaluation"]["data_dir"]}
    if evaluation is None or not (run.folder / "samples.json").is_file():
        raise UserError(
            "check=eval repeats the run's evaluation, which is no longer in its store, or samples.json is not "
            "beside its summary. Run the same command again, or leave check=eval out."
        )
    return evaluation


def in_words(proof: dict[str, Any]) -> str:
    """The proof in a few lines."""
    same = "equal bit for bit" if proof["equal"] else f"different by {proof['largest_difference']:.3g} at most"
    what = "base and adapter" if proof["adapter"] == "apart" else "the merged model"
    lines = [
        f"{what} as stock loaders read it, in {proof['dtype']} on {proof['device']}: logits {same} (largest logit "
        f"{proof['largest_logit']:.3g}), {proof['flipped_greedy_tokens']} of {proof['tokens']} greedy tokens "
        "flipped"
    ]
    for task, comparison in proof.get("evaluation", {}).items():
        said = f"mean score {comparison['difference']:+.4f}"
        if comparison["flipped"]:
            said = "{} flipped from right to wrong, {} back".format(*comparison["flipped"])
        lines.append(f"{task}: {comparison['items']} items, {said}")
    return "\n".join(lines + [f"{name}: {text}" for name, text in proof["formats"]["runtimes"].items()])
