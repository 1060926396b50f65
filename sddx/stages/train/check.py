"""What training refuses before any work."""

from __future__ import annotations

import os

from sddx.config import bound, raise_for
from sddx.config.build import Settings, build, made, only
from sddx.errors import UserError
from sddx.stages.local_model import Check, LocalModel

ADAPTER = ("rank", "dropout", "targets")


def of_settings(method: Settings) -> list[Check]:
    """The terms give what is summed, the settings go together, and weights can be held as they are asked to be."""
    return [
        lambda: _check_loss(method["loss"]),
        lambda: _check_rollouts(method),
        lambda: _check_training(method),
        lambda: _check_weights(method),
        lambda: _check_quantization(method),
    ]


def of_model(method: Settings, model: LocalModel) -> list[Check]:
    """Rows can be told in the model's tokens and form, an adapter finds its layers, another teacher fits."""
    from sddx.training.tuning import require_adapter, require_tuning

    tuning = method["tuning"]
    checks: list[Check] = [lambda: _check_tokens(method, model)]
    if method["loss"]["terms"]:
        checks += [lambda: model.ending, lambda: require_tuning(tuning, model.bare)]
    if method["loss"]["terms"] and "targets" in tuning:
        checks.append(lambda: require_adapter(model.bare(), **only(tuning, ADAPTER)))
    if method["teacher"]:
        checks.append(lambda: _check_teacher(method, model))
    # What is asked of the trainer is asked inside, or all of these checks would hang on its learning rate.
    return [*checks, lambda: _check_packing(method, model)]


def on_device(config: Settings, device: str) -> None:
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
    half = [(f"{name}={value}", f"{name}={full}") for name, value, full in asked if value in ("bf16", "bfloat16")]
    if half and not torch.cuda.is_bf16_supported(including_emulation=False):
        refused, instead = zip(*half, strict=True)
        raise UserError(
            f"{', '.join(refused)}, but a {torch.cuda.get_device_name()} does not compute in bfloat16. Use "
            f"{' '.join(instead)}."
        )


def _check_loss(loss: Settings) -> None:
    """The terms give what is summed. Raises UserError."""
    from sddx.training.objective import Objective, require_terms

    require_terms(made(loss, Objective, "loss"))


def _check_rollouts(method: Settings) -> None:
    """The training can wait for answers that the student writes. Raises UserError."""
    trainer, rollouts = method["trainer"], method["loss"].get("rollouts")
    if not rollouts:
        return
    wrong = []
    if trainer.get("budget") == "tokens":
        wrong.append(
            "trainer.budget=tokens counts the tokens of rows, and how long the student's own answers will be is "
            "not known beforehand. Train it with trainer.budget=steps, and what it is compared with by "
            "trainer.budget=tokens trainer.tokens=N, N being the supervised_tokens of its summary."
        )
    if trainer.get("strategy") == "fsdp":
        wrong.append(
            "the student writes while it is trained, token by token, and with trainer.strategy=fsdp its weights "
            "would be gathered for each. Use trainer.strategy=ddp, or single."
        )
    if trainer.get("packing"):
        wrong.append(
            "trainer.packing=true packs the rows of the data set, and with loss.rollouts the student writes others "
            "while it is trained. Set trainer.packing=false."
        )
    if wrong:
        raise UserError(*wrong)


def _check_training(method: Settings) -> None:
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


def _check_weights(method: Settings) -> None:
    """Weights that are trained themselves are held in float32: in half precision a step of a usual size is less
    than what tells a number from the next, and most of it is lost. Raises UserError."""
    dtype, patch = method["model"]["dtype"], build(method["pruning"]).patch
    if dtype == "float32" or not method["loss"]["terms"]:
        return
    everything = method["tuning"]["_target_"] == "sddx.training.tuning.full"
    block = patch.fit is not None and patch.trained and patch.fit.reads == "preceding"
    if everything or (block and method["pruning"]["remove"]):
        trained = "tuning=full trains all weights" if everything else "pruning.patch.trained=true trains a block"
        raise UserError(
            f"{trained}, and with model.dtype={dtype} most of each step would be rounded away. Use "
            "model.dtype=float32 trainer.precision=bf16, which computes in bfloat16, or tuning=lora."
        )


def _check_quantization(method: Settings) -> None:
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


def _check_tokens(method: Settings, model: LocalModel) -> None:
    """The model has an embedding for every token that it is given, and a row has an answer left within max_length
    and the context; of rows, those that are here. Raises UserError."""
    from sddx.data.check import examples_here, require_trainable
    from sddx.models.load import context_of, require_embedded

    tokenizer, config, length = model.tokenizer, model.config, method["max_length"]
    held_out, training = (
        examples_here(method["dataset"], method["validation"]) if method["loss"]["terms"] else ([], [])
    )
    require_embedded(tokenizer, config, (row.prompt + row.response for row in (*held_out, *training)))
    if training and tokenizer.chat_template:
        require_trainable(tokenizer, held_out, training, min(length, context_of(config) or length))


def _check_teacher(method: Settings, model: LocalModel) -> None:
    """Another teacher loads, reads what the student reads, and can be compared with it. Raises UserError."""
    from sddx.models.load import context_of, load_tokenizer, locate, require_loadable, text_config
    from sddx.training.objective import require_comparable

    folder, length = locate(method["teacher"])[0], method["max_length"]
    config = text_config(folder)
    require_comparable(build(method["loss"]), model.config, config)
    require_loadable(folder, method["model"]["attention"])
    if load_tokenizer(folder).get_vocab() != model.tokenizer.get_vocab():
        raise UserError(
            f"teacher={method['teacher']} has another tokenizer than the model: a token of one is not the token of "
            "that number of the other. Use a teacher with the same tokenizer."
        )
    room, read = context_of(config), min(length, context_of(model.config) or length)
    if room is not None and room < read:
        raise UserError(
            f"teacher={method['teacher']} reads {room} tokens, and rows have up to {read}. Set max_length={room}."
        )


def _check_packing(method: Settings, model: LocalModel) -> None:
    """Rows in one do not see one another, in the model and in another teacher. Raises UserError."""
    if not (method["loss"]["terms"] and method["trainer"].get("packing")):
        return
    from sddx.models.load import locate, text_config
    from sddx.training.trial import require_packable

    teachers = [text_config(locate(method["teacher"])[0])] if method["teacher"] else []
    for config in (model.config, *teachers):
        require_packable(config, model.attention)
