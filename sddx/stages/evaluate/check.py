"""What evaluation refuses before any work."""

from __future__ import annotations

from functools import partial
from typing import Any

from sddx.config.build import Settings, build, only
from sddx.errors import UserError, mistakes_of, require_none
from sddx.stages.local_model import Check, LocalModel
from sddx.stages.prepare.check import check_trained


def of_settings(method: Settings) -> list[Check]:
    """The tasks exist and their data is there, what evaluates is installed, and held-out texts can be had."""
    from sddx.data.check import require_texts

    return [
        lambda: _check_evaluation(method["evaluation"]),
        lambda: _check_backend(method),
        partial(require_texts, "text", method["text"]),
    ]


def of_model(method: Settings, model: LocalModel) -> list[Check]:
    """The context has room for what is asked, and the chat template carries it."""
    evaluation, checks = method["evaluation"], list[Check]()
    if tasks_exist := not mistakes_of([lambda: check_names(method)]):
        checks.append(lambda: _check_room(evaluation, model))
    if evaluation["chat_template"]:
        checks.append(lambda: model.ending)
    if evaluation["chat_template"] and tasks_exist:
        checks.append(lambda: _check_descriptions(evaluation, model.tokenizer))
    return checks


def check_names(config: Settings) -> None:
    """The tasks that are evaluated, that settings are given for and whose skill rows are said to train exist.
    Raises UserError."""
    from sddx.evaluation.tasks import check_tasks

    evaluation = config["evaluation"]
    settings = {key: evaluation.get(key) for key in ("limit", "shots", "primary", "chance", "split", "cluster")}
    settings["apart"] = evaluation.get("apart") or []
    check_evaluated = partial(check_tasks, evaluation["tasks"], evaluation["include"], **settings)
    require_none(mistakes_of([check_evaluated, lambda: check_trained(config)]))


def _check_evaluation(evaluation: Settings) -> None:
    """The tasks can be evaluated by these settings, and what they read is there. Raises UserError."""
    from sddx.evaluation.harness import require_tasks

    read = ("tasks", "include", "split", "shots", "primary", "chance", "limit", "cluster", "apart", "data_dir")
    require_tasks("evaluation", **only(evaluation, read))


def _check_backend(method: Settings) -> None:
    """What evaluates the models is installed, and can load what is left of them. Raises UserError."""
    if method["evaluation"].get("backend") != "vllm":
        return
    if method["evaluation"].get("generation_config") == "model":
        raise UserError(
            "evaluation.generation_config=model is what lm-eval does with transformers; with vLLM it never uses "
            "the model's own settings. Use evaluation.backend=hf or evaluation.generation_config=neutral."
        )
    if not build(method["pruning"]).is_stock:
        raise UserError(
            "evaluation.backend=vllm loads whole blocks of the model's own kind alone. Removed branches "
            "(pruning.units) and patches that are modules of their own need evaluation.backend=hf; patches that "
            "vLLM can load: pruning/patch=block, and linear_ffn or mean with pruning.patch.fold=true."
        )
    engine = build(method["evaluation"]["vllm"])
    if method["loss"]["terms"]:
        engine.require_adapter(method["tuning"].get("rank"))
    engine.require()


def _check_room(evaluation: Settings, model: LocalModel) -> None:
    """The context has room for what tasks ask the model to write, and their prompts beside it. Raises UserError."""
    from lm_eval.models.utils import resolve_max_length

    from sddx.evaluation.harness import require_prompts_fit
    from sddx.evaluation.task_data import written
    from sddx.evaluation.tasks import require_room
    from sddx.models.load import context_of

    tokenizer, config, longest = model.tokenizer, model.config, evaluation.get("max_new_tokens")
    answers = written(evaluation["tasks"], evaluation["include"], longest)
    require_room(answers, resolve_max_length(config, tokenizer))
    names = ("tasks", "include", "chat_template", "shots", "split", "max_new_tokens", "data_dir")
    if context := context_of(config):
        require_prompts_fit(tokenizer, context, **only(evaluation, names))


def _check_descriptions(evaluation: Settings, tokenizer: Any) -> None:
    """The chat template carries what tasks say before their items. Raises UserError."""
    from sddx.data.encode import require_system_turn
    from sddx.evaluation.task_data import described

    if tokenizer.chat_template and (descriptions := described(evaluation["tasks"], evaluation["include"])):
        require_system_turn(tokenizer, descriptions)
