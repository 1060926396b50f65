"""What a whole configuration must satisfy beyond its keys, found out before any work starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sddx.config import bound, raise_for
from sddx.config.build import build, made
from sddx.errors import UserError, require_none, told
from sddx.records import Units
from sddx.tracking import require as require_tracked

ADAPTER = ("rank", "dropout", "targets")


def precheck(
    method: dict[str, Any], wandb: dict[str, Any], *, download: bool, device: str = "auto", shaky: bool = False
) -> None:
    """What would otherwise fail late; `wandb` is the tracker's node. Raises one UserError with all that is wrong
    with the settings alone and, where the model is on this machine, with what is to be done to it; a model is
    downloaded only where that is asked for and the settings are right. Whether there is such a `device` is asked
    where the run takes place. `shaky`: other mistakes are known, which checks may stumble over."""
    from sddx.models.load import is_here, locate, require_known, require_loadable

    path, revision = method["model"]["path"], method["model"]["revision"]
    device_known: list[Callable[[], Any]] = [partial(require_known, device)]
    wrong = told([*device_known, *_of_settings(method), lambda: require_tracked(wandb)], shaky=shaky)
    if is_here(path, revision) or (download and not wrong):
        found: list[Path] = []

        def find() -> None:
            folder, _ = locate(path, revision=revision)
            require_loadable(folder, method["model"]["attention"])
            found.append(folder)

        wrong += told([find], shaky=shaky)
        wrong += [mistake for folder in found for mistake in told(_of_model(method, folder), shaky=shaky)]
    require_none(wrong)


def check_names(config: dict[str, Any]) -> None:
    """The tasks that are evaluated, that settings are given for and whose skill rows are said to train exist.
    Raises UserError."""
    from sddx.evaluation.tasks import check_tasks

    evaluation = config["evaluation"]
    given = {key: evaluation.get(key) for key in ("limit", "shots", "primary", "chance", "split", "cluster")}
    check_evaluated = partial(check_tasks, evaluation["tasks"], evaluation["include"], **given)
    require_none(told([check_evaluated, lambda: _check_trained(config)]))


def _of_settings(method: dict[str, Any]) -> list[Callable[[], Any]]:
    """The evaluation tasks exist and their data is there, rows and texts can be had, what writes answers and what
    judges models is installed, the devices can share the training, weights can be held as they are asked to be."""
    from sddx.data.check import require_rows, require_texts
    from sddx.data.templates import rewriting_prompt
    from sddx.importance.score import require_metric

    checks: list[Callable[[], Any]] = [
        lambda: _check_loss(method["loss"]),
        lambda: _check_evaluation(method["evaluation"]),
        lambda: _check_looked_at(method["pruning"]),
        lambda: _check_backend(method),
        lambda: _check_training(method),
        lambda: _check_quantization(method),
    ]
    metric = method["pruning"].get("metric")
    if metric is not None:
        checks.append(lambda: require_metric("pruning.metric", build(metric)))
    checks += [partial(require_texts, name, method[name]) for name in ("calibration", "text")]
    if method["loss"]["terms"]:
        checks.append(lambda: require_rows(method["dataset"], method["validation"]))
        checks.append(lambda: _check_trained(method))
    if method["loss"]["data"] == "self":
        checks.append(lambda: rewriting_prompt(method["dataset"]["rewrite"], "", ""))
    if method["loss"]["data"] != "reference":
        checks.append(lambda: getattr(build(method["generation"]), "require", lambda: None)())
    return checks


def _of_model(method: dict[str, Any], folder: Path) -> list[Callable[[], Any]]:
    """Something is left to train, metric and patch can be what they are asked to be, an adapter finds its layers,
    the chat template carries prompts, answers and the tasks' descriptions, another teacher fits the student."""
    from sddx.estimate.skeleton import skeleton
    from sddx.models.load import require_one_head, text_config
    from sddx.training.tuning import require_adapter, require_tuning

    config, attention = text_config(folder), method["model"]["attention"]
    bare = partial(skeleton, config, method["model"]["dtype"])
    checks: list[Callable[[], Any]] = [
        lambda: _check_pruning(method, config),
        lambda: _check_family(method, config, attention),
    ]
    if tasks_exist := not told([lambda: check_names(method)]):
        checks.append(lambda: _check_room(method["evaluation"], folder, config))
    if config.tie_word_embeddings:
        checks.append(lambda: require_one_head(folder, bare()))
    checks.append(lambda: _check_tokens(method, folder, config))
    if method["loss"]["terms"] or method["evaluation"]["chat_template"]:
        checks.append(lambda: _check_template(folder))
    if method["evaluation"]["chat_template"] and tasks_exist:
        checks.append(lambda: _check_descriptions(method["evaluation"], folder))
    if method["loss"]["terms"]:
        checks.append(lambda: require_tuning(method["tuning"], bare))
    if method["loss"]["terms"] and "targets" in method["tuning"]:
        checks.append(lambda: require_adapter(bare(), **_given(method["tuning"], ADAPTER)))
    if method["teacher"]:
        checks.append(lambda: _check_teacher(method, config))
    return checks


def _given(node: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Of these settings those that the node gives; the others have their defaults."""
    return {name: node[name] for name in names if name in node}


def _check_teacher(method: dict[str, Any], config: Any) -> None:
    """Another teacher loads, and can be compared with the student. Raises UserError."""
    from sddx.models.load import locate, require_loadable, text_config
    from sddx.training.objective import require_comparable

    folder = locate(method["teacher"])[0]
    require_comparable(build(method["loss"]), config, text_config(folder))
    require_loadable(folder, method["model"]["attention"])


def _check_loss(loss: dict[str, Any]) -> None:
    """The terms give what is summed. Raises UserError."""
    from sddx.training.objective import Objective, require_terms

    require_terms(made(loss, Objective, "loss"))


def _check_evaluation(evaluation: dict[str, Any]) -> None:
    """The tasks can be evaluated by these settings, and what they read is there. Raises UserError."""
    from sddx.evaluation.harness import require_tasks

    read = ("tasks", "include", "split", "shots", "primary", "chance", "limit", "cluster", "apart", "data_dir")
    require_tasks("evaluation", **{key: evaluation[key] for key in read if key in evaluation})


def _check_trained(method: dict[str, Any]) -> None:
    """The tasks whose skill the rows are said to train exist: else none would be marked. Raises UserError."""
    from sddx.evaluation.tasks import missing, not_texts

    trains = method["dataset"].get("trains") or []
    wrong = not_texts(trains, "dataset.trains") + missing(trains, method["evaluation"]["include"], "dataset.trains")
    if wrong:
        raise UserError(*wrong)


def _check_descriptions(evaluation: dict[str, Any], folder: Path) -> None:
    """The chat template carries what tasks say before their items. Raises UserError."""
    from sddx.data.encode import require_system_turn
    from sddx.evaluation.task_data import described
    from sddx.models.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template and (told := described(evaluation["tasks"], evaluation["include"])):
        require_system_turn(tokenizer, told)


def _check_template(folder: Path) -> None:
    """Prompts and answers can be put into the model's own chat form, and told apart in it. Raises UserError."""
    from sddx.data.encode import ending
    from sddx.models.load import load_tokenizer

    ending(load_tokenizer(folder))


def _check_tokens(method: dict[str, Any], folder: Path, config: Any) -> None:
    """The model has an embedding for every token that it is given, and a row has an answer left within max_length
    and the context; of rows, those that are here. Raises UserError."""
    from sddx.data.check import examples_here, require_trainable
    from sddx.models.load import context_of, load_tokenizer, require_embedded

    tokenizer, length = load_tokenizer(folder), method["max_length"]
    held_out, training = (
        examples_here(method["dataset"], method["validation"]) if method["loss"]["terms"] else ([], [])
    )
    require_embedded(tokenizer, config, (row.prompt + row.response for row in (*held_out, *training)))
    if training and tokenizer.chat_template:
        require_trainable(tokenizer, held_out, training, min(length, context_of(config) or length))


def _check_room(evaluation: dict[str, Any], folder: Path, config: Any) -> None:
    """The context has room for what tasks ask the model to write, and their prompts beside it. Raises UserError."""
    from lm_eval.models.utils import resolve_max_length

    from sddx.evaluation.harness import require_prompts_fit
    from sddx.evaluation.task_data import written
    from sddx.evaluation.tasks import require_room
    from sddx.models.load import context_of, load_tokenizer

    tokenizer, longest = load_tokenizer(folder), evaluation.get("max_new_tokens")
    answers = written(evaluation["tasks"], evaluation["include"], longest)
    require_room(answers, resolve_max_length(config, tokenizer))
    names = ("tasks", "include", "chat_template", "shots", "split", "max_new_tokens", "data_dir")
    asked = {name: evaluation[name] for name in names if name in evaluation}
    if context := context_of(config):
        require_prompts_fit(tokenizer, context, **asked)


def _check_pruning(method: dict[str, Any], config: Any) -> None:
    """At least one unit stays where it is to learn, and a patch can stand in for what goes. Raises UserError."""
    from sddx.compression.choose import Pruning, require_removable
    from sddx.compression.junction import require_patch
    from sddx.students.trial import require_rule
    from sddx.training.objective import require_junction

    pruning = made(method["pruning"], Pruning, "pruning")
    units = Units(pruning.units, config.num_hidden_layers)
    require_removable(len(units), pruning.remove, "units" if units.granularity != "blocks" else "blocks")
    if pruning.remove == len(units) and method["loss"]["terms"]:
        raise UserError(
            f"pruning.remove={pruning.remove} leaves nothing that could learn. Remove less, or loss=none."
        )
    require_rule(pruning, len(units))
    _check_measured(pruning.metric, len(units), config)
    if pruning.patch.fit is None and pruning.patch.trained:
        raise UserError("pruning.patch.trained=true, and there is no patch. Choose one: pruning/patch=linear.")
    if pruning.patch.fit is not None and pruning.remove:
        require_patch(config.model_type, units, pruning.patch)
        moved = pruning.patch.fold or pruning.patch.fit.reads != "stream"  # the block before the junction changes
        require_junction(build(method["loss"]), retrained=moved)


def _check_family(method: dict[str, Any], config: Any, attention: str) -> None:
    """Blocks can be taken out of a model of this kind: tried on a narrow one where no test has. Raises
    UserError."""
    from sddx.models.anatomy import FAMILIES
    from sddx.students.trial import try_out

    pruning, total = build(method["pruning"]), config.num_hidden_layers
    if config.model_type in FAMILIES or pruning.units != "blocks" or not 0 < pruning.remove < total:
        return
    first = 1 if pruning.remove < total - 1 else 0
    removed = range(first, first + pruning.remove)
    if pruning.metric is None:  # the cut hangs on no score
        removed = pruning.choose(None, total, pruning.remove)
    try_out(config, Units("blocks", total).cut(removed), attention)


def _check_looked_at(pruning: dict[str, Any]) -> None:
    """The tasks that a metric looks at can be evaluated, and what they read is there. Raises UserError."""
    require = getattr(getattr(build(pruning).metric, "value", None), "require", None)
    if require:
        require()


def _check_measured(metric: Any, units: int, config: Any) -> None:
    """A metric can measure so many units, and the tasks that it looks at are in words of the model. Raises
    UserError."""
    from sddx.evaluation.tasks import OWN_TASKS, named_in_files
    from sddx.models.load import text_config

    getattr(metric, "require", lambda units: None)(units)
    tasks = getattr(getattr(metric, "value", None), "tasks", [])
    embedded = [task for task in tasks if task in named_in_files([OWN_TASKS])]
    if embedded and config.vocab_size != text_config(OWN_TASKS.parent / "checkpoint").vocab_size:
        raise UserError(
            f"The pruning metric looks at {', '.join(embedded)}, of the embedded world, and this model has other "
            "words. Give tasks of yours, as in pruning.metric.value.tasks=[mmlu] "
            "'pruning.metric.value.split={mmlu: validation}' (see conf/pruning/shapley_task.yaml)."
        )


def _check_backend(method: dict[str, Any]) -> None:
    """What judges the models is installed, and can load what is left of them. Raises UserError."""
    from sddx.evaluation.harness import BACKENDS

    backend = method["evaluation"].get("backend", "hf")
    if backend not in BACKENDS:
        raise UserError(f"evaluation.backend={backend} is not known. Use one of {', '.join(BACKENDS)}.")
    if backend != "vllm":
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


def _check_training(method: dict[str, Any]) -> None:
    """The settings of the training go together, there are rows to choose the best by, and one process alone was
    started. Raises UserError."""
    trainer = method["trainer"]
    started = os.environ.get("WORLD_SIZE", "1") if "TORCHELASTIC_RUN_ID" in os.environ else "1"
    if started != "1":
        raise UserError(
            f"torchrun started {started} processes of the whole run. Start it once, with `python -m sddx.train`: "
            f"trainer.strategy=ddp trainer.devices={started} starts its own processes."
        )
    if trainer.get("keep") == "best" and not method["validation"]:
        raise UserError("trainer.keep=best chooses by held-out rows, and validation=0 holds out none. Use last.")
    build(trainer)


def check_hardware(config: dict[str, Any], device: str) -> None:
    """Where the run itself takes place (a sweep may be started elsewhere): there are as many CUDA devices as are
    asked for, and they compute in what weights and training are to be in. Raises UserError."""
    import torch

    if not device.startswith("cuda"):
        return
    trainer = config["trainer"]
    devices, there = trainer.get("devices", 1), torch.cuda.device_count()
    if trainer.get("strategy", "single") != "single" and (":" in device or devices > there):
        raise UserError(
            f"trainer.devices={devices} with device={device}, but torch finds {there} CUDA devices. Ask for no "
            "more, with device=cuda; CUDA_VISIBLE_DEVICES chooses which."
        )
    quantization = config["tuning"].get("quantization") or {}
    asked = [
        ("trainer.precision", trainer.get("precision"), "32"),
        ("model.dtype", config["model"]["dtype"], "float32"),
        ("tuning.quantization.compute", quantization.get("compute"), "float32"),
    ]
    half = [(f"{name}={given}", f"{name}={full}") for name, given, full in asked if given in ("bf16", "bfloat16")]
    if half and not torch.cuda.is_bf16_supported(including_emulation=False):
        given, instead = zip(*half, strict=True)
        raise UserError(
            f"{', '.join(given)}, but a {torch.cuda.get_device_name()} does not compute in bfloat16. Use "
            f"{' '.join(instead)}."
        )


def _check_quantization(method: dict[str, Any]) -> None:
    """4-bit weights can be had, and nothing is asked of them that they cannot do. Raises UserError."""
    from sddx.models.load import four_bit

    quantization, patch = method["tuning"].get("quantization"), build(method["pruning"]).patch
    if quantization is None:
        return
    raise_for([*bound("tuning.quantization", quantization, four_bit)])
    four_bit(**quantization)
    if method["trainer"].get("strategy") == "fsdp":
        raise UserError("4-bit weights cannot be cut into shards: use trainer.strategy=ddp or tuning=lora.")
    if patch.fit is not None and method["pruning"]["remove"] and (patch.fold or patch.fit.reads == "preceding"):
        raise UserError(
            "4-bit weights can take up no patch: set pruning.patch.fold=false (pruning/patch=block cannot be), or "
            "use tuning=lora."
        )
