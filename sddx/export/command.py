"""The command line of lm-eval that evaluates an exported model as its run did, as far as it can be told to.

What its arguments do was read in lm-eval 0.4.13.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from sddx.data.encode import around, render
from sddx.evaluation.tasks import named_in_files, of_task, task_folders
from sddx.models.generation import TOKENS
from sddx.models.load import load_tokenizer

# lm-eval says itself how long answers may be and whether they are sampled.
SAID = (*TOKENS, "max_length", "max_new_tokens", "do_sample", "temperature")
ABOUT = ("transformers_version", "_from_model_config")
# What lm-eval's arguments have no word for, where the run's evaluation has it.
UNTOLD = {
    "limit": "The items were drawn from all of a task's, and --limit takes the first.",
    "split": "Some items are of another split of a task's data than its own.",
    "side": "Items were those on one side of a task's data.",
    "data_dir": "Rows were read from files, and lm-eval asks the hub for them.",
}


def lm_eval(folder: Path, evaluation: Mapping[str, Any]) -> tuple[str, list[str]]:
    """A shell line for a model with the tokenizer and the settings of generation in `folder`, and what that line
    cannot do, in sentences. `evaluation`: the run's."""
    chat = bool(evaluation.get("chat_template"))
    same = evaluation.get("encoding", "same") == "same"
    greedy = evaluation.get("generation_config", "neutral") == "neutral"
    reads, unlike = _reads(folder, chat) if same else ("", [])
    asked, untold = _asked(evaluation)
    unlike += untold
    words = ["lm_eval", "--model", "hf", "--model_args", "pretrained=." + reads, *asked]
    words += ["--apply_chat_template"] if chat else []
    own, longest = _own(folder), evaluation.get("max_new_tokens")
    aside = (_aside(own) if greedy else {}) | ({"max_gen_toks": longest} if longest else {})
    words += ["--gen_kwargs", json.dumps(aside)] if aside else []
    if greedy and own.max_new_tokens is not None:
        unlike.append(
            f"Answers end after {own.max_new_tokens} tokens: generation_config.json says so (max_new_tokens), and "
            "no argument of lm-eval sets it aside. Remove it there for the numbers above."
        )
    return shlex.join(words), unlike


def _asked(evaluation: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The tasks, with how many examples and items where one number holds for all; and what cannot be told of them
    so."""
    if not (tasks := evaluation.get("tasks")):
        return [], ["Which tasks the run evaluated is no longer known: name them with --tasks."]
    words, untold = ["--tasks", ",".join(tasks)], [UNTOLD[name] for name in UNTOLD if evaluation.get(name)]
    for setting, option in (("shots", "--num_fewshot"), ("limit", "--limit")):
        numbers = {task: of_task(evaluation.get(setting), task) for task in tasks}
        if len({*numbers.values()}) > 1:
            listed = ", ".join(f"{task} {'as it says' if n is None else n}" for task, n in numbers.items())
            untold.append(f"{option} is one for all tasks, and they had {listed}: evaluate them one by one.")
        elif (number := numbers[tasks[0]]) is not None:
            words += [option, str(number)]
    known = named_in_files(task_folders(None))
    if own := [task for task in tasks if evaluation.get("include") or task in known]:
        untold.append(f"Not all of {', '.join(own)} come with lm-eval: --include_path must name their folder.")
    return words, untold


def _own(folder: Path) -> GenerationConfig:
    exists = (folder / "generation_config.json").is_file()
    return GenerationConfig.from_pretrained(folder) if exists else GenerationConfig()


def _aside(own: GenerationConfig) -> dict[str, Any]:
    """The model's own settings of generation that change a greedy answer, each with its neutral value."""
    neutral = GenerationConfig()._get_default_generation_params()
    changed = {name for name, value in own.to_diff_dict().items() if value and value != neutral.get(name)}
    return {name: neutral.get(name) for name in sorted(changed - {*SAID, *ABOUT})}


def _reads(folder: Path, chat: bool) -> tuple[str, list[str]]:
    """More of `--model_args`, so that prompts are the tokens that they were; or that there is no such argument."""
    tokenizer = load_tokenizer(folder)
    begin, end = around(tokenizer)
    if not end or (chat and tokenizer.bos_token and render(tokenizer, "a").startswith(tokenizer.bos_token)):
        return "", []  # lm-eval puts nothing around a text that has its begin token
    if not begin:
        return ",add_bos_token=False", []
    return "", [
        "The tokenizer puts tokens before and after a text. lm-eval has both or none of them, where the numbers "
        "above have the former alone."
    ]
