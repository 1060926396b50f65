"""Every shipped file composes and binds; every mistake is named, all at once, before anything runs."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import remembered
import yaml
from composing import composed
from hydra import compose, initialize_config_dir
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import Container, DictConfig, Node, OmegaConf, flag_override

from sddx.config import CONF, SURROUNDINGS, check, flatten, resolve
from sddx.config.build import build
from sddx.errors import UserError
from sddx.pipeline import Method
from sddx.sweep.launcher import Grid
from sddx.train import check_settings, install, verify

FILES = [path.relative_to(CONF) for path in sorted(CONF.rglob("*.yaml")) if path.stem != "base"]
GROUPED = [path for path in FILES if path.parts[0] not in ("hydra", "sweeps", path.name)]
OPTIONS = [(path.parent.as_posix(), path.stem) for path in GROUPED]
# What is added: an experiment, and a term beside those of a loss.
ADDED = {
    "experiment": "+experiment",
    "rehearse": "+rehearse",
    "merging": "+merging",
    "merging/search": "+merging/search",
    "speculation": "+speculation",
    "drift": "+drift",
    "loss/term": "+loss/term@loss.terms.one_more",
}
OWED = {
    ("model", "local"): ["model.path=x"],
    ("dataset", "jsonl"): ["dataset.path=x"],
    ("calibration", "texts"): ["calibration.path=x"],
    ("text", "texts"): ["text.path=x"],
    ("evaluation", "custom"): ["evaluation.tasks=[x]"],
    **{
        ("merging", path.stem): ["merging.students=['seed=0','seed=1']"]
        for path in (CONF / "merging").glob("*.yaml")
    },
    **{
        ("merging/search", path.stem): ["+merging=slerp", "merging.students=['seed=0','seed=1']"]
        for path in (CONF / "merging" / "search").glob("*.yaml")
    },
}


def checked(*overrides: str, config_dir: Path | None = None) -> dict:
    with composed(*overrides, config_dir=config_dir) as cfg:
        config = resolve(cfg)
        check(config, Method, also=SURROUNDINGS)
        return config


def composed_plain(*overrides: str) -> dict:
    with composed(*overrides) as cfg:
        return resolve(cfg)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_composes_and_binds(group: str, option: str) -> None:
    """Each file of conf/ is a configuration that the code accepts."""
    config = checked(f"{ADDED.get(group, group)}={option}", *OWED.get((group, option), []))
    assert set(config["loss"]) >= {"data", "terms"}


def covering(sweeper: dict[str, Any]) -> Iterator[list[str]]:
    """So many cells of its grids that each value of each setting stands in one of them."""
    seen: set[str] = set()
    for grid in sweeper.get("grids", [{}]):
        given = {**sweeper.get("params", {}), **grid}
        settings = {name: re.split(r",(?![^\[]*\])", str(values)) for name, values in given.items()}
        for number in range(max(map(len, settings.values()))):
            cell = [f"{name}={values[min(number, len(values) - 1)]}" for name, values in settings.items()]
            if not seen.issuperset(cell):
                seen.update(cell)
                yield cell


@pytest.mark.parametrize("sweep", sorted(path.stem for path in (CONF / "sweeps").glob("*.yaml")))
def test_every_value_of_every_sweep_composes(sweep: str) -> None:
    """Each that a grid names, its own or of a sweep that it builds on, is one that the configuration takes, beside
    others of its grid and in the experiment of its command."""
    text = (CONF / "sweeps" / f"{sweep}.yaml").read_text()
    given = [*re.findall(r"^# python .*(\+experiment=\S+)", text, re.MULTILINE)[:1], f"+sweeps={sweep}"]
    given += [f"rates.{arm}=1e-4" for arm in yaml.safe_load(text).get("rates", [])]
    with composed(*given):
        sweeper: Any = OmegaConf.to_container(HydraConfig.get().sweeper, resolve=False)
    for cell in covering(sweeper):
        checked(*given, *cell)


@pytest.mark.parametrize(
    "given", [(), ("seed=3", "loss=kd"), ("+experiment=llama_26L", "~text.seed", "+dataset.x={a: 1}")]
)
def test_what_tests_remember_is_what_hydra_composes(
    given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same order, types and flags, the first time and from then on."""

    def found() -> tuple[str, str]:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", overrides=[*given], return_hydra_config=True)
        about = (vars(node._metadata) for node in nodes(cfg))
        return repr(cfg), str([{k: v for k, v in each.items() if k != "resolver_cache"} for each in about])

    remembered_once, again = found(), found()
    monkeypatch.setattr(defaults_list, "_create_interpolation_map", remembered.MAPPED)
    monkeypatch.setattr(config_loader_impl, "create_defaults_list", remembered.LISTED)
    monkeypatch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", remembered.MERGED)
    monkeypatch.setattr(remembered.FileConfigSource, "load_config", remembered.READ)
    assert found() == remembered_once == again


def nodes(node: Node) -> Iterator[Node]:
    """A configuration and all that is in it."""
    yield node
    if isinstance(node, Container) and not node._is_missing() and not node._is_none():
        keys = node.keys() if isinstance(node, DictConfig) else range(len(node))
        for key in keys:
            yield from nodes(node._get_node(key))


LAUNCHERS = ["basic", *sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml"))]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_is_made_from_its_file(launcher: str) -> None:
    """By Hydra's own way from a name to an engine that can be called."""
    install()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"hydra/launcher={launcher}"], return_hydra_config=True)
    with flag_override(cfg, "struct", False):
        made = Plugins.instance()._instantiate(cfg.hydra.launcher)
    assert isinstance(made, Grid) and callable(made.engine)
    if launcher.startswith("submitit"):
        assert type(made.engine.parameters) is dict


def test_all_mistakes_are_listed_at_once_with_near_names(tmp_path: Path) -> None:
    """A typo in an experiment file is as loud as one on the command line, and none hides another."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\npruning: {remov: 2}\ntrainer: {learning_rat: 1}\nsed: 3\n"
        "loss: {terms: {cross_entropy: {loss: {_target_: sddx.training.losses.cross_entrpy}}}}\n"
    )
    with pytest.raises(UserError) as caught:
        checked("+experiment=mine", config_dir=tmp_path)
    message = str(caught.value)
    for part in ("4 mistake", "pruning.remove?", "trainer.learning_rate?", "seed?", "cross_entropy"):
        assert part in message


def test_a_value_that_is_owed_is_asked_for_by_name() -> None:
    with pytest.raises(UserError, match="model.path"):
        checked("model=local")


def test_the_experiment_can_be_overridden_by_a_group_on_the_command_line() -> None:
    """`+experiment=llama_26L model=tiny`: the cut of the experiment, the model of the laptop."""
    config = checked("+experiment=llama_26L", "model=tiny")
    assert config["pruning"]["remove"] == 6
    assert config["model"]["path"].endswith("tiny/checkpoint")


def test_what_a_user_brings_is_checked_like_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of the user's own module, named in a file outside the package, binds to its signature."""
    (tmp_path / "my_losses.py").write_text("def focal(logits, labels, *, gamma):\n    return logits\n")
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "focal.yaml").write_text(
        "defaults: [none, _self_]\nterms:\n  focal:\n    _target_: sddx.training.objective.Supervised\n"
        "    weight: 1.0\n    loss: {_target_: my_losses.focal, _partial_: true}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="gamma has no value"):
        checked("loss=focal", config_dir=tmp_path)
    config = checked("loss=focal", "+loss.terms.focal.loss.gamma=2", config_dir=tmp_path)
    assert config["loss"]["terms"]["focal"]["loss"]["gamma"] == 2


def test_one_file_is_a_term_of_every_loss_and_a_metric_of_every_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added beside a loss's own terms, put in the place of a metric, or compared with the others; told apart from
    runs without it."""
    (tmp_path / "mine.py").write_text(
        "def focal(logits, labels, *, gamma):\n    return logits\ndef depth(states, mask):\n    return states\n"
    )
    for group in ("loss/term", "pruning/metric"):
        (tmp_path / group).mkdir(parents=True)
    (tmp_path / "loss/term/focal.yaml").write_text(
        "_target_: sddx.training.objective.Supervised\nweight: 0.5\n"
        "loss: {_target_: mine.focal, _partial_: true, gamma: 2}\n"
    )
    (tmp_path / "pruning/metric/depth.yaml").write_text("_target_: mine.depth\n_partial_: true\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = checked(
        "loss=sdd", "+loss/term@loss.terms.focal=focal", "pruning=block_influence", "pruning/metric=depth",
        "+pruning/metric@metrics.depth=depth", config_dir=tmp_path,
    )  # fmt: skip
    assert list(config["loss"]["terms"]) == ["cross_entropy", "focal"] and config["loss"]["data"] == "self"
    depth = {"_target_": "mine.depth", "_partial_": True}
    assert config["pruning"]["metric"] == config["metrics"]["depth"] == depth and len(config["metrics"]) == 17
    assert config["choices"]["pruning/metric"] == "depth"
    assert config["choices"]["loss/term@loss.terms.focal"] == "focal"


def test_what_was_set_by_hand_is_a_choice() -> None:
    """Beside the choices that are named, and what changes no number; with the values that came of it."""
    given = [
        "generation.temperature=0.7",
        "trainer=one_gpu",
        "+experiment=llama_26L",
        "seed=3",
        "wandb.mode=offline",
    ]
    with composed() as cfg:
        usual = resolve(cfg)["choices"]
    with composed(*given, "model=tiny", "pruning/patch=mean", "device=cpu") as cfg:
        chosen = resolve(cfg)["choices"]
    assert {name: chosen[name] for name in chosen.keys() - usual.keys()} == {
        "generation.temperature": 0.7, "trainer": "one_gpu"
    }  # fmt: skip
    assert chosen["seed"] == 3 and chosen["patch"] == "mean" and usual.keys() <= chosen.keys()


def test_runs_of_two_experiments_of_ones_own_are_told_apart(tmp_path: Path) -> None:
    """Whatever they set; a file of ours says it all in the choices that are named."""
    (tmp_path / "experiment").mkdir()
    for name, batch_size in (("mine", 2), ("other", 4)):
        text = f"# @package _global_\ntrainer: {{batch_size: {batch_size}}}\n"
        (tmp_path / "experiment" / f"{name}.yaml").write_text(text)
    chosen = [checked(f"+experiment={name}", config_dir=tmp_path)["choices"] for name in ("mine", "other")]
    assert [each["experiment"] for each in chosen] == ["mine", "other"]


FREE = {"seed": [-1]}  # seeds are names, which a number below zero is too
SHOWN = (
    (), ("generation=vllm", "pruning=shapley"), ("tuning=qlora", "pruning/patch=low_rank", "loss=jsd"),
    ("generation=sample", "pruning=released_subnetworks", "+experiment=llama_26L", "evaluation=quick"),
)  # fmt: skip


def numbers(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths to all numbers of a configuration."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from numbers(value, (*path, key))
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield path


@pytest.mark.parametrize("given", SHOWN, ids=lambda given: ",".join(given) or "defaults")
def test_numbers_that_make_no_sense_are_named(given: tuple[str, ...]) -> None:
    """Below zero, and not a number: every number there is is refused by its name, or may be anything."""
    config = checked(*given)
    paths = [path for path in numbers(config) if path[0] != "choices" and path[:2] != ("model", "dimensions")]
    assert len(paths) > 30
    for path, wrong in itertools.product(paths, (-1, "abc")):
        if wrong in FREE.get(path[-1], []):
            continue
        changed = copy.deepcopy(config)
        functools.reduce(dict.__getitem__, path[:-1], changed)[path[-1]] = wrong
        with pytest.raises(UserError, match=re.escape(f"{'.'.join(path)}={wrong!r} must be")):
            check(changed, Method, also=SURROUNDINGS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("context=0", "context=0 must be 1 or more"),
        ("budget=null", "budget=null must be a group of settings"),
        ("budget.gpu_hours=0", "budget.gpu_hours=0 must be above 0"),
        ("+budget.gpu_hour=1", "budget.gpu_hour is not a setting. Did you mean budget.gpu_hours?"),
        ("trainer.batch_size=1.5", "trainer.batch_size=1.5 must be a whole number"),
        ("trainer.learning_rate=null", "trainer.learning_rate=null must be a number"),
        ("generation.batch_size=0", "generation.batch_size=0 must be 1 or more"),
        ("generation.top_p=1.2", "generation.top_p=1.2 must be above 0 and at most 1"),
        ("dataset.size=0", "dataset.size=0 must be 1 or more"),
        ("evaluation.tasks=[]", "evaluation.tasks is empty"),
        ("evaluation.limit={tiny_facts:0}", "evaluation.limit.tiny_facts=0 must be 1 or more"),
        ("dry_run=2", "dry_run=2 must be true or false"),
        (
            "trainer.budget=token",
            "trainer.budget='token' must be examples or tokens or steps. Did you mean tokens?",
        ),
        ("trainer.precision=bf1", "trainer.precision='bf1' must be 32 or bf16. Did you mean bf16?"),
        (
            "loss.terms.cross_entropy=null",
            "loss.terms.cross_entropy=null must be a group of settings with its _target_",
        ),
        ("loss.terms.cross_entropy.loss=kd", "loss.terms.cross_entropy.loss='kd' must be a group of settings"),
        ("loss.terms.cross_entropy.loss._partial_=false", "_partial_ must be true"),
        ("pruning.metric=random", "pruning.metric='random' must be a group of settings with its _target_"),
        ("pruning.choose=lowest", "pruning.choose='lowest' must be a group of settings with its _target_"),
        ("dataset.check=null", "dataset.check=null must be a group of settings with its _target_"),
        ("evaluation._partial_=false", "evaluation._partial_ must be true"),
        ("trainer.learning_rate=0", "trainer.learning_rate=0 must be above 0"),
        ("trainer.keep=bets", "must be last or best. Did you mean best?"),
        ("trainer.strategy=null", "trainer.strategy=null must be single or ddp or fsdp"),
        ("loss.data=self_plane", "Did you mean self_plain?"),
        ("loss.terms.cross_entropy.weight=nan", "loss.terms.cross_entropy.weight=nan must be 0 or more"),
        ("loss.terms.cross_entropy.weight=inf", "loss.terms.cross_entropy.weight=inf must be 0 or more"),
        ("selfdata.fallback=refrence", "selfdata.fallback='refrence' must be reference or drop. Did you mean ref"),
        ("wandb.mode=on", "wandb.mode='on' must be offline or online or disabled"),
        ("pruning.metric.tokens=first", "pruning.metric.tokens='first' must be last or all"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(given: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        checked(given)


def test_precision_is_a_number_or_a_word() -> None:
    """32 on the command line is a number."""
    assert build(checked("trainer.precision=32")["trainer"]).precision == 32
    assert build(checked("trainer.precision=bf16")["trainer"]).precision == "bf16"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("~text._target_", "text="),
        ("+dataset._x=1", "_x is not for users"),
        ("+pruning._partial_=true", "pruning._partial_ must not be set"),
        ("+loss.terms.foo.weight=1", "loss.terms.foo="),
        ("loss.terms.cross_entropy.loss._target_=builtins.int", "does not say what it takes"),
        ("pruning.choose._target_=sddx.compression.choose.ranked", "called with 3 values"),
        ("wandb._target_=sddx.data.checkers.exact", "wandb._target_"),
        ("accept=[[distill]]", "accept holds ['distill']"),
        ("evaluation.limit={1: 2}", "evaluation.limit has 1 for a name"),
        ("evaluation.limit={tiny_facts: many}", "evaluation.limit.tiny_facts='many'"),
        ("budget.gpu_hours={a: 1}", "budget.gpu_hours="),
        ("seed=18446744073709551616", "from 0 to 4294967295"),
        ("dataset.seed=-1", "from 0 to 4294967295"),
        ("trainer.steps=1000000000000000000000", "that 64 bits can hold"),
    ],
)
def test_what_cannot_be_a_setting_is_refused(given: str, told: str) -> None:
    """By its own name, whatever stands there: a node without its target, hidden keys, what cannot be called as it
    will be, kinds of values, also inside of lists and of settings by task."""
    with pytest.raises(UserError) as caught:
        checked(given)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["loss=kd", "loss.terms.kl_teacher_student.loss.temperature=0"], "is not finite on random numbers"),
        (["loss=squarehead", "loss.terms.squarehead.reduction=token"], "loss gives [3] where [4] is summed"),
        (["loss=squarehead_token", "loss.terms.squarehead_token.reduction=micro_batch"], "gives [4] where [3]"),
        (
            ["loss=kd", "loss.terms.cross_entropy.weight=0", "loss.terms.kl_teacher_student.weight=0"],
            "nothing would",
        ),
        (["loss.terms.cross_entropy.loss._target_=sddx.training.losses.jsd_beta"], "failed when it was tried"),
        (["dataset.check._target_=operator.add"], "dataset.check gives"),
        (["pruning.metric=null"], "reads scores, and none were measured"),
        (["pruning.choose._target_=sddx.compression.choose.require_removable"], "failed when it was tried"),
        (
            ["pruning.metric._target_=sddx.importance.metrics._kept", "~pruning.metric.tokens"],
            "pruning.metric failed when it was tried",
        ),
    ],
)
def test_what_will_be_called_is_tried_before_work(given: list[str], told: str) -> None:
    """Losses, checkers, rules and metrics give what is made of them; a name alone does not say so."""
    with pytest.raises(UserError) as caught:
        verify(composed_plain(*given), download=False)
    assert told in str(caught.value)


ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    float("inf"),
    10**30,
    "",
    "abc",
    "é\u2028",
    [],
    [1],
    [[1]],
    {},
    {"a": 1},
]


OTHERS = ("loss=kd", "pruning=shapley_task", "pruning/patch=low_rank", "generation=sample", "tuning=qlora")


@pytest.mark.parametrize("overrides", [(), OTHERS], ids=["default", "others"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_setting_ends_in_a_traceback(seed: int, overrides: tuple[str, ...]) -> None:
    """Every setting in turn holds a value that was drawn for it from odd ones, or is gone: the
    run is refused in words, or is one that passes all checks."""
    few = ("dataset.size=48", "validation=8", "calibration.size=32", "text.size=16")
    draw, base = random.Random(seed), composed_plain(*few, *overrides)
    settings = sorted(flatten({key: value for key, value in base.items() if key not in ("choices", "run")}))
    for name in settings:
        config = copy.deepcopy(base)
        *above, last = name.split(".")
        node = functools.reduce(lambda inner, key: inner[key], above, config)
        value = draw.choice([*ODD, node[last], "sddx.training.losses.cross_entropy"])
        with contextlib.suppress(UserError):
            if draw.random() < 0.15:
                del node[last]
            else:
                node[last] = value
            check_settings(config)
            if draw.random() < 0.3:  # the dearer part, on some of those that pass
                verify({**config, "dry_run": True}, download=False)
