"""The model card of an export, and the record of where the model came from; no path of this machine is in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

import sddx
from sddx.export.command import lm_eval
from sddx.export.proof import evaluation_of
from sddx.report import table
from sddx.students.recovered import Recovered

UNKNOWN = "unknown: see the base model"
TERMS = ("license", "license_name", "license_link")
EXCERPT = (
    "name choices scores standard_errors recovery recovery_low recovery_high recovery_contains pruned_recovery "
    "recovery_trained recovery_held_out gap_closed trained chance text parameters cache_bytes depth examples "
    "supervised_tokens steps rollouts fallback_share seconds"
).split()


def record(run: Recovered) -> dict[str, Any]:
    """What the model is made of: its base, the cut, the keys of the run's artifacts, what the run found."""
    cut = run.cut
    return {
        "sddx": sddx.__version__,
        "base": base_name(run),
        "cut": {"kept": list(cut.kept), "total": cut.total, "name": cut.name},
        "artifacts": run.summary["artifacts"],
        "versions": run.summary["versions"],
        "summary": {name: _without_paths(run.summary[name]) for name in EXCERPT if name in run.summary},
    }


def _without_paths(value: Any) -> Any:
    """The same, but of a path (another teacher may be named by one) the last part alone."""
    if isinstance(value, dict):
        return {name: _without_paths(each) for name, each in value.items()}
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", ".")) else value


def text(run: Recovered, proof: dict[str, Any]) -> str:
    """The card: front matter for the hub, then what was done, what it scores, how to load it, what was proven."""
    name, metadata = base_name(run), front_matter(run.base)
    terms: dict[str, Any] = {key: value for key, value in metadata.items() if key in TERMS}
    front = {
        **({"base_model": name} if "/" in name else {}),  # the hub takes ids of its own only
        **terms,
        "library_name": "peft" if proof["adapter"] == "apart" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sddx", "depth-pruning", "self-distillation"],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}, pruned to {run.cut.name}" + (" and recovered" if run.trained else ""),
        "\n".join(f"- {label}: {said}" for label, said in _facts(run, name, terms)),
        "## Scores",
        table.markdown(run.summary).rstrip(),
        "## Loading it",
        _loading(run, proof),
        "## Proof",
        _proven(proof),
    ]
    return "\n\n".join(parts) + "\n"


def base_name(run: Recovered) -> str:
    """The base model's hub id where it came from the hub's cache, else the name of the `model` group's file; for a
    folder of the user's own, the folder's name."""
    cached = re.search(r"models--(.+?)/snapshots/", run.base.as_posix())
    if cached:
        return cached[1].replace("--", "/", 1)
    choice = run.summary["choices"]["model"]
    return run.base.name if choice == "local" else choice


def front_matter(folder: Path) -> dict[str, Any]:
    """The YAML at the head of a model's README.md; empty where there is none that can be read."""
    path = folder / "README.md"
    written = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    match = re.match(r"---\s*\n(.*?)\n---", written, re.DOTALL)
    try:
        fields = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        fields = None
    return fields if isinstance(fields, dict) else {}


def _facts(run: Recovered, name: str, terms: dict[str, Any]) -> list[tuple[str, str]]:
    summary, chosen, cut = run.summary, run.summary["choices"], run.cut
    patch = chosen["patch"] + (", folded into the weights" if chosen.get("patch_fold") else "")
    removed = ", ".join(map(str, cut.removed)) or "none"
    return [
        ("base model", name),
        ("licence", f"{terms.get('license', UNKNOWN)} (the base model's)" if terms else UNKNOWN),
        (
            "blocks removed",
            f"{len(cut.removed)} of {cut.total}, counted from 0: {removed} (by {chosen['pruning']})",
        ),
        ("in their place", patch if chosen["patch"] != "none" else "nothing"),
        ("parameters", f"{summary['parameters']['unpruned']:,} before, {parameters(summary):,} after"),
        *_training(summary, chosen),
        ("made with", ", ".join(f"{package} {version}" for package, version in summary["versions"].items())),
    ]


def _training(summary: dict[str, Any], chosen: dict[str, Any]) -> list[tuple[str, str]]:
    if not summary["steps"]:
        return [("training", "none: the model is as it was cut")]
    rows = "all rows" if chosen["size"] is None else f"{chosen['size']:,} rows"
    return [
        ("training data", f"{chosen['dataset']}, {rows}, seed {chosen['dataset_seed']}"),
        ("training", f"loss {chosen['loss']}, tuning {chosen['tuning']}, seed {chosen['seed']}"),
    ]


def parameters(summary: dict[str, Any]) -> int:
    """How many the recovered model has, its adapter merged."""
    sizes = summary["parameters"]
    return sizes.get("patched", sizes["pruned"])


def _loading(run: Recovered, proof: dict[str, Any]) -> str:
    runtimes = "\n".join(f"- {name}: {said}" for name, said in proof["formats"]["runtimes"].items())
    if proof["adapter"] == "apart":
        code = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")\n'
            'tokenizer = AutoTokenizer.from_pretrained("base")'
        )
        note = (
            "`base` is the pruned model without its adapter. The adapter belongs to it and to no other: on the "
            "unpruned model it would land on the wrong blocks."
        )
        return f"```python\n{code}\n```\n\n{note}\n\nOther runtimes, for `base` alone:\n\n{runtimes}"
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")'
    )
    shell, unlike = lm_eval(run.base, evaluation_of(run) or {})
    parts = [f"```python\n{code}\n```", f"```bash\n{shell}\n```", *unlike, "Other runtimes:", runtimes]
    return "\n\n".join(parts)


def _proven(proof: dict[str, Any]) -> str:
    same = (
        "were, bit for bit, those" if proof["equal"] else f"were within {proof['largest_difference']:.3g} of those"
    )
    where = f"in {proof['dtype']} on {proof['device']}, over {proof['tokens']} tokens of {proof['prompts']} prompts"
    return (
        f"The logits of what is in this folder, read by stock loaders, {same} of the recovered model as it was "
        f"trained, {where}; {proof['flipped_greedy_tokens']} greedy tokens flipped. The largest logit was "
        f"{proof['largest_logit']:.3g}. All of it is in `proof.json`; `sddx.json` says which cut and which run."
    )
