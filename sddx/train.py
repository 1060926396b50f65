"""The main job: `python -m sddx.train`. Prune a model, let it teach itself, measure what came back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from sddx.build import Called, Node, build
from sddx.config import (
    CONF,
    SURROUNDINGS,
    check,
    flatten,
    register,
    resolve,
    writable_folder,
)
from sddx.entry import command, mistakes_told, require_one_run
from sddx.errors import UserError, require_none, told
from sddx.lines import lines
from sddx.models.packaged import located
from sddx.precheck import check_hardware, precheck
from sddx.records import Artifact
from sddx.rehearse import announce
from sddx.report.agreement import show_agreement
from sddx.report.summary import Found, Taught, conclude
from sddx.run_folder import CONFIG, SUMMARY, claimed
from sddx.runtime import Runtime
from sddx.store import Store, default_root
from sddx.store.digest import digest
from sddx.sweep import launcher, sweeper
from sddx.sweep.cells import is_cell, show
from sddx.sweep.plan import Plan, describe
from sddx.tracking import Tracker, mark

# How a training is run, which changes its numbers by rounding alone and no key.
HOW_RUN = ("log_every", "checkpoint_every", "gradient_checkpointing", "strategy", "devices")
STAGES = ("prepare", "score", "prune", "patch", "distill", "train", "written", "evaluate", "overlap", "report")


def recover(
    store: Store,
    runtime: Runtime,
    *,
    choices: dict[str, Any],
    model: Node,
    calibration: Node,
    pruning: Node,
    dataset: Node,
    validation: int,
    generation: Annotated[Node, Called(4)],
    selfdata: Annotated[Node, Called(1)],
    loss: Node,
    teacher: str | None,
    tuning: Annotated[Node, Called(2)],
    trainer: Annotated[Node, Called(10)],
    max_length: int,
    evaluation: Annotated[Node, Called(4)],
    text: Node,
    seed: int,
) -> tuple[Found, Artifact]:
    """Self-data distillation of a depth-pruned model (arXiv 2410.09982), stage by stage.

    Each stage is built where the store lacks it. A loss without terms trains nothing: the pruned model is judged as
    it is. Returns all that was built, and the report on it, which names the run's `choices`. Raises UserError for
    a user's mistake.
    """
    from transformers.utils.logging import disable_progress_bar

    from sddx.data.sources import pinned
    from sddx.models.load import locate
    from sddx.stages.evaluate import evaluate
    from sddx.stages.overlap import overlap
    from sddx.stages.patch import patch
    from sddx.stages.prepare import prepare
    from sddx.stages.prune import prune
    from sddx.stages.report import report
    from sddx.stages.score import score

    runtime = replace(runtime, training={key: trainer[key] for key in HOW_RUN if key in trainer})
    if evaluation.get("backend") != "vllm":
        evaluation = {key: value for key, value in evaluation.items() if key != "vllm"}
    dataset = pinned(dataset) if loss["terms"] else dataset
    calibration, text = pinned(calibration), pinned(text)
    disable_progress_bar()  # a bar for every loaded model hides those that matter
    make = partial(store.build, runtime=runtime)
    how = {"dtype": model["dtype"], "attention": model["attention"]}
    folder, _ = locate(model["path"], revision=model["revision"])
    unpruned = _model(store, "model", folder)

    data = []
    if loss["terms"]:  # first, since nothing is to be paid for where rows are missing
        data = [make(prepare, *_files(store, dataset), dataset=dataset, validation=validation)]
    texts, units = _files(store, calibration), pruning.get("units", "blocks")
    scores, patches = [], []
    if pruning.get("metric") is not None:
        metrics = {"pruning": pruning["metric"]}
        read = [*texts, *_task_files(store, metrics)]
        metrics = _by_content(store, metrics)
        scores = [make(score, unpruned, *read, metrics=metrics, units=units, calibration=calibration, **how)]
    cut = make(prune, unpruned, *scores, choose=pruning["choose"], remove=pruning["remove"], units=units, **how)
    chosen = store.by_content(cut, "cut.json")  # metrics that choose the same units share all that follows
    if pruning["patch"]["fit"] is not None and pruning["remove"]:
        stand = _settings(pruning["patch"])
        patches = [make(patch, unpruned, chosen, *texts, patch=stand, calibration=calibration, **how)]

    # Before training is paid for: that the tasks can be evaluated at all.
    files, evaluation_files = _files(store, evaluation, text), _files(store, evaluation)
    evaluation = _by_content(store, evaluation)
    if "evaluation.data_dir" in choices:
        choices = {**choices, "evaluation.data_dir": evaluation["data_dir"]}
    judge = partial(make, evaluate, unpruned, evaluation=evaluation, text=text, **how)
    results = {"unpruned": judge(*files)}

    taught, shared = Taught(), []
    asked: dict[str, Any]
    if loss["terms"]:
        rewriting = {"dataset": dataset, "generation": generation, "selfdata": selfdata}
        learning = {"loss": loss, "tuning": tuning, "trainer": _learned(trainer), "max_length": max_length}
        learning |= {"selfdata": _kept(selfdata) if loss["data"] != "reference" else {}, "seed": seed}
        taught = teach(store, runtime, unpruned, chosen, patches, data[0], teacher, rewriting, learning, how)
        asked = {name: evaluation.get(name) for name in ("tasks", "include", "limit", "split")}
        asked |= {name: evaluation[name] for name in ("data_dir", "side", "cluster") if evaluation.get(name)}
        shared = [make(overlap, *taught.data, *evaluation_files, **asked)]

    inputs = {"pruned": [chosen, *patches]}
    if taught.student:
        inputs["recovered"] = [chosen, *patches, *taught.student]
    results |= {name: judge(*given, *files) for name, given in inputs.items()}
    found = Found(unpruned, scores, cut, patches, taught, results, shared)
    return found, make(report, *found.artifacts(), choices=choices)


def teach(
    store: Store,
    runtime: Runtime,
    unpruned: Artifact,
    cut: Artifact,
    patches: list[Artifact],
    data: Artifact,
    teacher: str | None,
    rewriting: dict[str, Any],
    learning: dict[str, Any],
    how: dict[str, Any],
) -> Taught:
    """The rows, rewritten by the unpruned model where the loss asks for self-data, and the pruned model that
    learned from them."""
    from sddx.models.load import locate
    from sddx.stages.distill import distill
    from sddx.stages.train import train
    from sddx.stages.written import written

    dataset, style = rewriting["dataset"], learning["loss"]["data"]
    # The held-out rows first; the rest in shards, so that a larger set shares those of a smaller one.
    examples = [data.path / "validation.jsonl", *sorted((data.path / "shards").iterdir())]
    rows = [store.source("rows", path) for path in examples]
    if style != "reference":
        total = sum(len(lines(path)) for path in examples)
        asked = {"guided": style == "self", "rewrite": dataset["rewrite"], "check": _check(dataset, rewriting)}
        asked["reference"] = rewriting["selfdata"].get("reference", "right")
        bar = {"what": "distilling", "unit": "row", "moved": "distill/written", "shown": "distill/accepted"}
        with runtime.counting(total, **bar) as watched:
            rewrite = partial(store.build, distill, unpruned, runtime=watched, generation=rewriting["generation"])
            rows = [rewrite(shard, **asked, **how) for shard in rows]

    teachers = [_model(store, "teacher", locate(teacher)[0])] if teacher else []
    inputs = [unpruned, cut, *rows, *patches, *teachers]
    student = store.build(train, *inputs, runtime=runtime, **learning, **how)
    shown = []
    if style != "reference":
        answers, length = [unpruned, cut, *rows[1:], *patches], learning["max_length"]
        shown = [store.build(written, *answers, runtime=runtime, max_length=length, **how)]
    return Taught([data], rows, [student], shown)


def _check(dataset: dict[str, Any], rewriting: dict[str, Any]) -> Node:
    """What decides whether an answer may be trained on: the data set's own check, or the one that is asked for."""
    name = rewriting["selfdata"].get("check", "dataset")
    named = {"open": "sddx.data.checkers.open_answer", "none": "sddx.data.checkers.none"}
    return dataset["check"] if name == "dataset" else {"_target_": named[name], "_partial_": True}


def _kept(selfdata: Node) -> Node:
    """What training needs to know of self-data; how they were written is in the rows."""
    return {key: value for key, value in selfdata.items() if key not in ("check", "reference")}


def _learned(trainer: dict[str, Any]) -> dict[str, Any]:
    """The settings of a training that decide what is learned, of the numbers of its budgets the one that counts."""
    from sddx.training.batches import COUNTED

    idle = set(COUNTED.values()) - {COUNTED.get(trainer.get("budget", ""))}
    return {key: value for key, value in trainer.items() if key not in (*HOW_RUN, *idle)}


def _task_files(store: Store, metrics: dict[str, Any]) -> list[Artifact]:
    """The files of evaluation tasks that metrics look at."""
    values = [metric.get("value") for metric in metrics.values()]
    return list(dict.fromkeys(_files(store, *(v for v in values if isinstance(v, dict) and "tasks" in v))))


def score_all(config: dict[str, Any], store: Store, runtime: Runtime) -> Artifact:
    """The scores of every unit under every metric of the group `metrics`, on the calibration texts."""
    from sddx.data.sources import pinned
    from sddx.models.load import locate
    from sddx.stages.score import score

    model, calibration = config["model"], pinned(config["calibration"])
    folder, _ = locate(model["path"], revision=model["revision"])
    how = {"dtype": model["dtype"], "attention": model["attention"]}
    units, metrics = config["pruning"].get("units", "blocks"), config["metrics"]
    given = [_model(store, "model", folder), *_files(store, calibration), *_task_files(store, metrics)]
    metrics = _by_content(store, metrics)
    return store.build(score, *given, runtime=runtime, metrics=metrics, units=units, calibration=calibration, **how)


def _model(store: Store, name: str, folder: Path) -> Artifact:
    """A model where it lies, with where its parts are found."""
    from sddx.models.families import reading
    from sddx.models.load import decides, text_config

    return replace(store.source(name, folder, decides), reading=digest(reading(text_config(folder))))


def _settings(node: dict[str, Any]) -> dict[str, Any]:
    """A node's own settings, without what calls it."""
    return {key: value for key, value in node.items() if not key.startswith("_")}


def _files(store: Store, *nodes: dict[str, Any]) -> list[Artifact]:
    """What these settings read from disk, by content, the package's own evaluation tasks included; and the data of
    tasks that the hub has, by commit."""
    from sddx.evaluation.task_data import task_commits
    from sddx.evaluation.tasks import OWN_TASKS

    paths = [Path(node[key]) for node in nodes for key in ("path", "include", "data_files") if node.get(key)]
    evaluated = [node for node in nodes if "tasks" in node]
    asked = [(node["tasks"], node.get("include"), node.get("data_dir")) for node in evaluated]
    commits = [found for each in asked if (found := task_commits(*each))]
    files = [store.source("files", path) for path in ([OWN_TASKS] if asked else []) + paths]
    files += [_task_rows(store, node) for node in evaluated if node.get("data_dir")]
    return files + [Artifact("files", digest(found), OWN_TASKS) for found in commits]


def _task_rows(store: Store, node: dict[str, Any]) -> Artifact:
    """The folder that evaluation tasks take their rows from, by the content of the files that they read there."""
    from sddx.evaluation.task_data import task_files
    from sddx.evaluation.task_files import ROWS, folder_of

    found = task_files(node["tasks"], node.get("include"), node["data_dir"])
    keys = {task: {split: store.source(ROWS, path).key for split, path in of.items()} for task, of in found.items()}
    return Artifact(ROWS, digest(keys), folder_of(node["data_dir"]) or Path())


def _by_content(store: Store, settings: Any) -> Any:
    """Settings in which a folder of tasks' rows is known by the key of what is read there, wherever it lies."""
    if not isinstance(settings, dict):
        return settings
    found = {name: _by_content(store, value) for name, value in settings.items()}
    placed = "tasks" in settings and settings.get("data_dir")
    return {**found, "data_dir": _task_rows(store, settings).key} if placed else found


def verify(config: dict[str, Any], *, download: bool = True) -> None:
    """Raises one UserError with all that is wrong with a configuration, before any work; without `download` and in
    a dry_run, with what can be told of a model that is not here."""
    wrong = told([partial(check_settings, config)])

    def look_further() -> None:
        download_now = download and not (config["dry_run"] or wrong)
        asked = {"download": download_now, "device": config["device"], "shaky": bool(wrong)}
        precheck(method(config), config["wandb"], **asked)

    require_none([*wrong, *told([look_further], shaky=bool(wrong))])


def owes_model(config: dict[str, Any]) -> bool:
    """Whether a run of this configuration has a model to download first."""
    from sddx.models.load import is_here

    here = is_here(config["model"]["path"], config["model"]["revision"])
    return not (here and (config["teacher"] is None or is_here(config["teacher"], None)))


def check_settings(config: dict[str, Any]) -> None:
    """Raises UserError for what is wrong with the settings by themselves, wherever and whenever they are run."""
    from sddx.estimate.show import require_device

    check(config, recover, also=SURROUNDINGS)
    if config["stages"] not in (None, ["score"]):
        raise UserError(f"stages={config['stages']} is not known. Leave it null for a whole run, or use [score].")
    require_device(config)
    if unknown := set(config["accept"]) - set(STAGES):
        raise UserError(f"accept={sorted(unknown)} names no stage. The stages are {', '.join(STAGES)}.")


def look(config: dict[str, Any]) -> Plan:
    """What a run of this configuration would build. Nothing is built but the rows of its data set. Raises UserError
    where its models are not here."""
    from sddx.models.load import require_here

    require_here(config["model"]["path"], config["model"]["revision"])
    if config["teacher"]:
        require_here(config["teacher"])
    plan = Plan(Path(config["store"] or default_root()), config["accept"])
    if config["stages"]:
        score_all(config, plan, Runtime(quiet=True))
    else:
        recover(plan, Runtime(quiet=True), **method(config))
    return plan


def afford(config: dict[str, Any]) -> None:
    """Raises UserError for a run that is wrong, or that costs more than it may."""
    from sddx.estimate.show import require

    if not told([partial(check_settings, config)]):
        require([config])  # first: it needs no model
    verify(config)


def tell(plans: Sequence[Plan], configs: Sequence[dict[str, Any]]) -> None:
    """Print what these runs would build; where nothing else is to happen, also what that costs on a device. Raises
    UserError where it costs more than it may."""
    from sddx.estimate.costs import Estimate
    from sddx.estimate.show import require, show

    describe(plans)
    if not configs[0]["dry_run"]:
        require(configs)
    else:
        show([Estimate(config) for config in configs], configs[0], Console(width=max(100, Console().width)))


def run(config: dict[str, Any], folder: Path) -> Path:
    """Recover and report, in a run folder of its own. Returns the path of `summary.json` (with stages=[score], of
    `agreement.md`); raises UserError."""
    from sddx.models.load import find_device, free_memory

    verify(config)
    device = find_device(config["device"])
    check_hardware(config, device)
    writable_folder(folder, "hydra.run.dir")
    OmegaConf.save(OmegaConf.create(config), folder / CONFIG)
    store = Store(Path(config["store"] or default_root()), config["accept"])
    with _tracker(config, store, folder) as tracker:
        sharded = config["trainer"].get("strategy") == "fsdp"
        runtime = Runtime(device, shards=config["trainer"]["devices"] if sharded else 1, log=tracker.log)
        if config["stages"]:
            return show_agreement(score_all(config, store, runtime), config["pruning"], folder)
        if is_cell(folder):
            runtime = replace(runtime, watch=partial(show, folder))
        found, report = recover(store, runtime, **method(config))
        free_memory()  # the next cell of a sweep may run in this process
        about = {"name": config["run"]["name"], "store": str(store.root), "accepted_sources": store.accepted}
        summary = conclude(found, report, folder, about)
        tracker.summarise(flatten(summary))
    return folder / SUMMARY


@contextmanager
def _tracker(config: dict[str, Any], store: Store, folder: Path) -> Iterator[Tracker]:
    """Metrics to CSV and W&B. A finished cell of a sweep that W&B has seen already opens no second run there."""
    asked = [method(config), config["metrics"]] if config["stages"] else method(config)
    settings, identity = config["wandb"], digest(asked)[:16]
    seen = mark(store.root, identity, settings)
    if is_cell(folder) and seen.exists() and all(step.present for step in look(config).steps):
        settings = {**settings, "mode": "disabled"}
    flat = config["choices"] | flatten(method(config))
    with build(settings)(folder, identity, config["run"]["name"], flat) as tracker:
        yield tracker
    seen.touch()


def method(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what is built."""
    return {key: value for key, value in config.items() if key not in SURROUNDINGS}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> None:
    logging.captureWarnings(True)
    with mistakes_told():
        require_one_run("run them all")
        config = located(resolve(cfg))
        announce(config)
        if config["dry_run"]:
            verify(config)
            tell([look(config)], [config])
        else:
            afford(config)
            with claimed(Path(HydraConfig.get().runtime.output_dir), config) as folder:
                print(run(config, folder))


register()
launcher.install(verify, look, tell, "sddx.train.run", first=partial(verify, download=False), owes=owes_model)
sweeper.install()
if __name__ == "__main__":
    command(main)
