"""The main job: `python -m sddx.train`. Prune a model, let it teach itself, measure what came back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from sddx.config import (
    CONF,
    SURROUNDINGS,
    check,
    flatten,
    register,
    resolve,
    writable_folder,
)
from sddx.config.build import build, with_defaults
from sddx.config.entry import command, mistakes_told, require_one_run
from sddx.config.shared import sharing
from sddx.errors import UserError, mistakes_of, require_none
from sddx.gguf.located import located
from sddx.pipeline import Method, Run
from sddx.records import PROFILE_FILE, Artifact
from sddx.run_folder import CONFIG, SUMMARY, claimed
from sddx.runtime import Runtime
from sddx.stages.check import check_surroundings, precheck
from sddx.stages.evaluate.check import check_names
from sddx.stages.folders import STAGES
from sddx.store import Store, default_root
from sddx.store.digest import digest
from sddx.sweep import launcher, sweeper
from sddx.sweep.cells import is_cell, show
from sddx.sweep.plan import Kept, Plan, describe
from sddx.tiny.rehearse import announce
from sddx.tracking import Tracked, Tracker, made, mark, open_tracker

log = logging.getLogger(__name__)


@sharing()
def verify(config: dict[str, Any], *, download: bool = True) -> None:
    """Raises one UserError with all that is wrong with a configuration, before any work: with what can be told of
    settings and names alone, in a moment; where these are right, with what rows, tasks and the model say of them
    (without `download` and in a dry_run, only where the model is here), unless all is made already."""
    check_alone(config)
    _check_further(config, download=download and not config["dry_run"], finished=is_finished(config))


def check_alone(config: dict[str, Any]) -> None:
    """Raises one UserError where settings are wrong by themselves, with the names of tasks that there are not."""
    if wrong := mistakes_of([partial(check_settings, config)]):
        require_none([*wrong, *mistakes_of([partial(check_names, with_defaults(config))], shaky=True)])


def _check_further(config: dict[str, Any], *, download: bool, finished: bool) -> None:
    wrong = mistakes_of([partial(check_surroundings, config["logger"], config["device"])])
    if finished:
        wrong += mistakes_of([partial(build, config["trainer"])])  # some of which are in no key
    else:
        asked = {"stages": config["stages"], "download": download and not wrong}
        wrong += mistakes_of([partial(precheck, _asked(config), **asked)])
    require_none(wrong)


def owes_model(config: dict[str, Any]) -> bool:
    """Whether a run of this configuration has a model to download first."""
    from sddx.models.load import is_here

    here = is_here(config["model"]["path"], config["model"]["revision"])
    return not (here and (config["teacher"] is None or is_here(config["teacher"], None)))


def check_settings(config: dict[str, Any]) -> None:
    """Raises UserError for what is wrong with the settings by themselves, wherever and whenever they are run."""
    from sddx.estimate.show import require_device

    check(config, Method, also=SURROUNDINGS)
    if config["stages"] not in (None, ["score"]):
        raise UserError(f"stages={config['stages']} is not known. Leave it null for a whole run, or use [score].")
    require_device(config)
    if unknown := set(config["accept"]) - set(STAGES):
        raise UserError(f"accept={sorted(unknown)} names no stage. The stages are {', '.join(STAGES)}.")


def is_finished(config: dict[str, Any]) -> bool:
    """Whether the store has all that a run of this configuration makes. Where that cannot be told, it has not."""
    root = Path(config["store"] or default_root()).expanduser()
    if config["stages"] or not root.is_dir() or owes_model(config):
        return False
    try:
        _ = Run(Kept(root, config["accept"]), Runtime(quiet=True), method(config)).report
    except Exception:  # whatever stands in its way, the checks tell
        return False
    return True


def look(config: dict[str, Any]) -> Plan:
    """What a run of this configuration would build. Nothing is built but the rows of its data set. Raises UserError
    where its models are not here."""
    from sddx.models.load import require_here

    require_here(config["model"]["path"], config["model"]["revision"])
    if config["teacher"]:
        require_here(config["teacher"])
    plan = Plan(Path(config["store"] or default_root()), config["accept"])
    if config["stages"]:
        Run(plan, Runtime(quiet=True), method(config)).scored(config["metrics"])
    else:
        _ = Run(plan, Runtime(quiet=True), method(config)).report
    return plan


@sharing()
def afford(config: dict[str, Any]) -> None:
    """Raises UserError for a run that is wrong, or that costs more than it may."""
    check_alone(config)
    if not (finished := is_finished(config)):
        from sddx.estimate.show import require
        from sddx.stages.cost import estimated

        require([config], estimated)  # first: it needs no model
    _check_further(config, download=True, finished=finished)


def tell(plans: Sequence[Plan], configs: Sequence[dict[str, Any]]) -> None:
    """Print what these runs would build; where nothing else is to happen, also what that costs on a device. Raises
    UserError where it costs more than it may."""
    from sddx.estimate.show import require, show
    from sddx.stages.cost import estimated

    describe(plans)
    if not configs[0]["dry_run"]:
        require(configs, estimated)
    else:
        show([estimated(config) for config in configs], configs[0], Console(width=max(100, Console().width)))


def run(config: dict[str, Any], folder: Path) -> Path:
    """Verify, recover and report, in a run folder of its own. Returns the path of `summary.json` (with
    stages=[score], of `agreement.md`); raises UserError."""
    verify(config)
    return recover(config, folder)


def recover(config: dict[str, Any], folder: Path) -> Path:
    """The same for a configuration that was verified, as every cell of a sweep is before the first one starts."""
    from sddx.models.load import find_device, free_memory
    from sddx.report.summary import conclude, rewrites
    from sddx.stages.train.check import on_device

    device = find_device(config["device"])
    on_device(config, device)
    writable_folder(folder, "hydra.run.dir")
    OmegaConf.save(OmegaConf.create(config), folder / CONFIG)
    store = Store(Path(config["store"] or default_root()), config["accept"])
    with _tracker(config, store, folder) as tracker:
        sharded = config["trainer"].get("strategy") == "fsdp"
        runtime = Runtime(device, shards=config["trainer"]["devices"] if sharded else 1, log=tracker.log)
        if config["stages"]:
            scores = Run(store, runtime, method(config)).scored(config["metrics"])
            from sddx.report.agreement import show_agreement

            return show_agreement(scores, config["pruning"], folder)
        if is_cell(folder):
            runtime = replace(runtime, watch=partial(show, folder))
        recovery = Run(store, runtime, method(config))
        report = recovery.report
        if config["trainer"].get("profile"):
            _say_where(recovery.student)
        free_memory()  # the next cell of a sweep may run in this process
        about = {"name": config["run"]["name"], "store": str(store.root), "accepted_sources": store.accepted}
        summary = conclude(report, rewrites(recovery.rows[1:]), folder, about)
        tracker.summarise(flatten(summary))
    return folder / SUMMARY


def _say_where(student: Artifact | None) -> None:
    """Say where the profile of the training is, or why there is none."""
    if student is not None and (profile := student.path / PROFILE_FILE).is_file():
        log.info("Profile of the training: %s", profile)
    else:
        log.warning(
            "trainer.profile=true: nothing was trained, so there is no profile. Where the store had the student "
            "already, use another seed=..., or store=... of an empty folder."
        )


@contextmanager
def _tracker(config: dict[str, Any], store: Store, folder: Path) -> Iterator[Tracker]:
    """Metrics to the loggers. A finished run is not logged again where what was logged of it is still there."""
    tracked = Tracked(folder, digest(_asked(config))[:16], config["run"]["name"])
    marks = {name: mark(store.root, tracked.identity, node) for name, node in config["logger"].items()}
    seen = {name for name, marked in marks.items() if _still_there(marked)}
    if seen and not is_finished(config):
        seen = set()
    loggers = made(config["logger"], tracked, seen)
    flat = config["choices"] | flatten(settings(config))
    with open_tracker(folder, flat, list(loggers.values())) as tracker:
        yield tracker
    for name in loggers:
        marks[name].write_text(str(folder.absolute()), encoding="utf-8")


def _still_there(mark: Path) -> bool:
    """Whether a logger has seen a run, and the folder that it ran in then is there."""
    return mark.is_file() and Path(mark.read_text(encoding="utf-8")).is_dir()


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what is built."""
    return {key: value for key, value in config.items() if key not in SURROUNDINGS}


def _asked(config: dict[str, Any]) -> dict[str, Any]:
    """The same, with the metrics where these are all that is asked for."""
    return settings(config) | ({"metrics": config["metrics"]} if config["stages"] else {})


def method(config: dict[str, Any]) -> Method:
    """The settings as the pipeline takes them."""
    return Method(**settings(config))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> None:
    """Run one configuration from its check to its report."""
    logging.captureWarnings(True)
    with mistakes_told():
        require_one_run("run them all")
        config = located(resolve(cfg))
        announce(config)
        if config.get("dry_run"):
            verify(config)
            tell([look(config)], [config])
        else:
            afford(config)
            with claimed(Path(HydraConfig.get().runtime.output_dir), config) as folder:
                print(recover(config, folder))


def publish(folder: Path, config: dict[str, Any]) -> None:
    """What the cells of a sweep found; `config` is one cell's."""
    from sddx.report.publish import of_sweep

    of_sweep(folder, config["logger"], config["wandb"]["group"])


def install() -> None:
    """Let Hydra know what YAML files rely on, and run our grids. May be called more than once."""
    register()
    first = partial(verify, download=False)
    launcher.install(verify, look, tell, "sddx.train.recover", first=first, owes=owes_model, report=publish)
    sweeper.install()


if __name__ == "__main__":
    install()
    command(main)
