"""The dress rehearsal: an experiment's own settings on small stand-ins for what is large or far away."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sddx.errors import UserError
from sddx.records import Count
from sddx.store import default_root
from sddx.store.digest import digest

TASKS = ["tiny_arithmetic", "tiny_facts"]  # one that is written, one that is chosen
SKILLS = ("arithmetic", "comparison")  # of the rows of a run, and of every other student that it merges
TRAINED = {"budget": "examples", "epochs": 1}
# What writes in place of an engine of its own, which needs a GPU.
WRITER = {
    "_target_": "sddx.data.selfdata.write_answers", "_partial_": True, "batch_size": 128,
    "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0,
}  # fmt: skip

FEWER = 64  # tokens that are captured of a teacher at most: a stand-in's vocabulary is small


def small(
    config: dict[str, Any], *, width: Count, rows: Count, texts: Count, items: Count, new_tokens: Count
) -> dict[str, Any]:
    """The configuration with a random model of the same architecture, depth and kinds of layers but `width`
    channels, `rows` rows and `texts` texts of the embedded world, and `items` items of two of its tasks; answers of
    `new_tokens`, one epoch, on the CPU.

    Under `rehearse` stands what was replaced, one line each; all else is left as it is.
    """
    from sddx.models.narrow import MOST

    store = Path(config["store"] or default_root()).expanduser()
    folder = _random_model(config["model"], width, store / "rehearsals")
    dataset, evaluation, generation = config["dataset"], config["evaluation"], config["generation"]
    choices, held_out = config["choices"], 8
    world = {"_target_": "sddx.tiny.data.conversations", "size": texts}
    replaced = {
        "model": {**config["model"], "path": str(folder), "revision": None, "dimensions": None},
        "dataset": _rows(dataset, rows, SKILLS[0]),
        "calibration": {**world, "split": "calibration", "seed": 0},
        "text": {**world, "split": "text", "seed": 1},
        "evaluation": _evaluation(evaluation, TASKS, items, new_tokens),
        "generation": _generation(generation, new_tokens),
        "trainer": {**config["trainer"], **TRAINED},
        "validation": held_out,
        "choices": {**choices, "size": rows, **{n: f"{choices[n]}, rehearsed" for n in ("model", "dataset")}},
        "teacher": None,
        "device": "cpu",
        "run": {**config["run"], "name": f"rehearsal-{config['run']['name']}"},
        "wandb": {**config["wandb"], "mode": "disabled"},
        "logger": {},
    }  # fmt: skip
    said = [
        f"model: {config['model']['path']} by random weights of its architecture and depth, {width} channels wide "
        f"and at most {MOST['max_position_embeddings']} tokens of context",
        f"rows: {dataset.get('name', dataset['_target_'])} by {rows} word problems of the embedded world, with the "
        "checker and the rewriting template of the experiment",
        f"held-out rows: {config['validation']} by {held_out}",
        f"texts for scoring and for KL: {texts} of the embedded world",
        f"tasks: {', '.join(evaluation['tasks'])} by {items} items of {' and '.join(TASKS)}, without shots, "
        "with their own metrics and chance levels",
        f"answers: {new_tokens} tokens; one epoch; on the CPU; no logger",
    ]
    if _is_engine(generation) or evaluation.get("backend") == "vllm":
        said.append("vLLM, wherever it writes or evaluates: by transformers")
    for name, (smaller, instead) in _besides(config, replaced, rows, items, new_tokens, held_out).items():
        replaced[name] = smaller
        said.append(instead)
    if config["teacher"]:
        said.append(f"teacher: {config['teacher']} by the unpruned model")
    return {**config, **replaced, "rehearse": said}


def _besides(
    config: dict[str, Any], replaced: dict[str, Any], rows: int, items: int, new_tokens: int, held_out: int
) -> dict[str, tuple[Any, str]]:
    """What only some runs have, made smaller, each with what stands for what."""
    found: dict[str, tuple[Any, str]] = {}
    if asked := config.get("speculation"):
        smaller = {**asked, "size": held_out, "max_new_tokens": new_tokens, "datasets": {}}
        instead = f"drafts: {asked['size']} prompts of each data set by the {held_out} held-out rows"
        found["speculation"] = smaller, instead
    if asked := config.get("drift"):
        smaller = {**asked, "size": held_out, "max_new_tokens": new_tokens}
        found["drift"] = smaller, f"drift: {asked['size']} held-out rows by {held_out}"
    if (k := config["teacher_cache"]) and k > FEWER:
        found["teacher_cache"] = FEWER, f"tokens captured of the teacher: {k} by {FEWER}"
    if config["loss"].get("rollouts"):
        found["loss"] = _loss(config["loss"], new_tokens), f"rollouts: at most {new_tokens} tokens"
    if asked := config.get("merging"):
        shared = replaced | {name: smaller for name, (smaller, _) in found.items()}
        merged = _merging(asked, shared, rows, items, new_tokens)
        found["merging"] = merged, f"merged: rows of each student by {rows} of {' and '.join(SKILLS)} in turn"
    return found


def _rows(dataset: dict[str, Any], rows: int, skill: str) -> dict[str, Any]:
    kept = {name: dataset[name] for name in ("seed", "check", "rewrite")}
    source = {"_target_": "sddx.tiny.data.dataset", "skill": skill, "shift": 1.0, "size": rows}
    return {**source, **kept, "trains": [f"tiny_{skill}"]}


def _loss(loss: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    if not (asked := loss.get("rollouts")):
        return loss
    longest = {name: min(asked.get(name) or new_tokens, new_tokens) for name in ("first", "last")}
    return {**loss, "rollouts": {**asked, **longest}}


def _evaluation(asked: dict[str, Any], tasks: list[str], items: int, new_tokens: int) -> dict[str, Any]:
    none = ["include", "shots", "primary", "chance", "split"]
    none += [name for name in ("data_dir", "side", "cluster") if name in asked]
    small = {"tasks": tasks, "limit": items, "max_new_tokens": new_tokens, "backend": "hf"}
    return {**asked, **dict.fromkeys(none), **small, **({"apart": []} if "apart" in asked else {})}


def _generation(asked: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    if _is_engine(asked):
        asked = WRITER | {name: asked[name] for name in ("temperature", "top_p", "top_k", "seed") if name in asked}
    return {**asked, "max_new_tokens": new_tokens}


def _is_engine(generation: Mapping[str, Any]) -> bool:
    """Whether a process of its own writes, which makes its own batches."""
    return "batch_size" not in generation


def _merging(
    merging: dict[str, Any], replaced: dict[str, Any], rows: int, items: int, new_tokens: int
) -> dict[str, Any]:
    """What is merged, with the stand-ins of the run itself but rows of their own, and a search on selection items
    of the same tasks. Raises UserError for the folder of a finished run."""
    students = []
    for number, student in enumerate(merging["students"]):
        if not isinstance(student, Mapping):
            raise UserError(
                f"+rehearse=cpu: {student} is a finished run's folder, whose student is of no stand-in. Name "
                "students by what they change here: merging.students=['seed=0','seed=1']."
            )
        own = {"dataset": _rows(student["dataset"], rows, SKILLS[number % len(SKILLS)])}
        own["loss"] = _loss(student["loss"], new_tokens)
        own["generation"] = _generation(student["generation"], new_tokens)
        own["trainer"] = {**student["trainer"], **TRAINED}
        same = {name: replaced[name] for name in student if name in replaced and name != "choices"}
        students.append({**student, **same, **own})
    if not (search := merging.get("search")):
        return {**merging, "students": students}
    selection = _evaluation(search["evaluation"], [f"{task}_selection" for task in TASKS], items, new_tokens)
    return {**merging, "students": students, "search": {**search, "evaluation": selection}}


def _random_model(model: dict[str, Any], width: int, root: Path) -> Path:
    """The folder of a random model with the embedded tokenizer, made where it is not there yet. Raises UserError
    for a width that it cannot have."""
    import torch

    from sddx.estimate.skeleton import shape_of
    from sddx.models.load import DTYPES, load_tokenizer
    from sddx.models.narrow import built, narrow

    shape, tokenizer = shape_of(model), load_tokenizer(_tiny())
    words = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = narrow(shape, width=width, vocabulary=len(tokenizer), **words)
    folder = root / f"{config.model_type}-{digest([config.to_dict(), model['dtype']])[:12]}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as name:
        built(config, DTYPES.get(model["dtype"], torch.float32)).save_pretrained(Path(name) / "made")
        tokenizer.save_pretrained(Path(name) / "made")
        if not folder.exists():
            os.replace(Path(name) / "made", folder)
    return folder


def _tiny() -> Path:
    return Path(__file__).parents[1] / "tiny" / "checkpoint"


def announce(config: dict[str, Any]) -> None:
    """Print what a rehearsal replaced; nothing for a run that is none."""
    if config.get("rehearse"):
        print("A rehearsal: its numbers mean nothing. Replaced:")
        print("\n".join(f"  {line}" for line in config["rehearse"]))
        print("All else is the experiment's.")
