"""A run's folder: held by one run at a time, never given to a run of other settings, and read by every command."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import RootModel, model_validator

from sddx.config import SURROUNDINGS, writable_folder
from sddx.errors import UserError
from sddx.files import lock
from sddx.files.shapes import Form, having, read, read_json

CONFIG, SUMMARY, SAMPLES, AGREEMENT = "config.yaml", "summary.json", "samples.json", "agreement.md"
LOCK = "run.lock"
log = logging.getLogger(__name__)

ByTask = Annotated[dict[str, float], having("average")]
Sizes = Annotated[dict[str, int], having("unpruned", "pruned")]


class Choices(Form):
    """What tells a run from another, as far as every run has it."""

    model: str
    loss: str
    seed: int
    removed: int


class Built(Form):
    """The keys of a run's artifacts; of some stages there may be none, of `distill` and `select` several."""

    model: str = ""
    score: str = ""
    prune: str = ""
    patch: str = ""
    train: str = ""
    distill: str | list[str] = ""
    select: str | list[str] = ""


class Written(Form):
    """What was written in self-data, and the models' surprise by it (sddx.data.written)."""

    copied: float | None
    cut_off: float | None
    rouge_l: float | None
    words: dict[str, float | None]
    sample: int
    surprise: dict[str, dict[str, float | None]]


class Rollouts(Form):
    """What a student wrote while it was trained (sddx.training.writer.Tally)."""

    rows: int
    tokens: int
    ended: int
    repeating: int
    seconds: float


class Reported(Form):
    """What a report takes from a summary: a run's choices, what its models scored, what it cost."""

    choices: Choices
    artifacts: Built
    scores: Annotated[dict[str, ByTask], having("unpruned", "pruned")]
    trained: list[str]
    recovery: float | None
    recovery_low: float | None
    recovery_high: float | None
    recovery_trained: float | None
    recovery_held_out: float | None
    recovery_above_chance: float | None
    gap_closed: float | None
    pruned_recovery: float | None
    cut: list[int]
    blocks: int
    no_attention: list[int] = []
    no_feedforward: list[int] = []
    text: dict[str, dict[str, float | None]] = {}
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    unparsed: dict[str, dict[str, dict[str, float | None]]] = {}
    primary: dict[str, str | None] = {}
    part_of: dict[str, str] = {}
    apart: list[str] = []
    likelihoods: dict[str, dict[str, dict[str, float]]] = {}
    parameters: Sizes
    seconds: dict[str, float]
    peak_memory: dict[str, int]
    examples: int
    supervised_tokens: int
    steps: int
    fallback_share: float | None
    written: Written | None = None
    rollouts: Rollouts | None = None
    store: str = ""


class ChoicesOfModel(Choices):
    """The choices that a model is described by."""

    pruning: str
    patch: str
    tuning: str
    dataset: str
    size: int | None
    dataset_seed: int | None


class BuiltModel(Built):
    """The artifacts that every model is made of."""

    model: str
    prune: str


class Kept(Reported):
    """What is needed beyond that to find a run's models again, and to say what they are."""

    choices: ChoicesOfModel
    artifacts: BuiltModel
    standard_errors: dict[str, dict[str, float]]
    cache_bytes: Sizes
    store: str
    model_path: str
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    attention: str
    versions: dict[str, str]


class Judged(Form):
    """The items of one task: each one's score and hash, and how they were evaluated."""

    scores: list[float]
    hashes: list[str]
    settings: dict[str, Any]
    part_of: str
    apart: bool = False
    clusters: list[str] | None = None
    bits_per_byte: list[float] | None = None
    margin: list[float] | None = None

    @model_validator(mode="after")
    def pair(self) -> Judged:
        """The record, if every list has an entry for each item. Raises ValueError otherwise."""
        if len(self.scores) != len(self.hashes):
            raise ValueError(f"{len(self.scores)} scores of {len(self.hashes)} items")
        for name in ("clusters", "bits_per_byte", "margin"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.scores):
                raise ValueError(f"{name} holds {len(values)} values of {len(self.scores)} items")
        return self


class Samples(RootModel[dict[str, dict[str, Judged]]]):
    """By model and task."""


def read_summary(path: Path, form: type[Reported] = Reported) -> dict[str, Any]:
    """A run's summary. Raises UserError for a file that is none, with where it is wrong."""
    return read_json(path, form)


def folder_of(path: Path | str) -> Path:
    """The folder that a path to a run means: itself, or that of its `summary.json`."""
    path = Path(path).expanduser()
    return path.parent if path.name == SUMMARY else path


def read_samples(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores, item hashes and settings by model and task. Raises UserError as `read_summary` does."""
    return read_json(folder / SAMPLES, Samples)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that a run was started with. Raises UserError as `read_summary` does."""
    return read(folder / CONFIG, _settings)


def _settings(text: str) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(str(error)) from None
    if not isinstance(config, dict):
        raise ValueError("it holds a list")
    return config  # type: ignore[return-value]


def holds_another(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder holds results of other settings than these, or of settings that cannot be told."""
    return any((folder / name).exists() for name in (SUMMARY, AGREEMENT)) and is_another(folder, config)


def is_another(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the settings that lie in a folder, as far as they decide results, are others or cannot be told."""
    try:
        settings = read_config(folder)
    except UserError:
        return True
    ours = {key: value for key, value in config.items() if key not in SURROUNDINGS}
    if config["stages"]:
        ours |= {key: config[key] for key in ("stages", "metrics")}
    return {key: settings.get(key) for key in ours} != _settings(OmegaConf.to_yaml(OmegaConf.create(ours)))


@contextmanager
def claimed(asked: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder for this run alone as long as the body runs: `asked`; where another run works there, or has left
    results of other settings, the first of `asked-2`, `asked-3`, .. that is free. Log files go along. Raises
    UserError for a folder that cannot be written."""
    with ExitStack() as held:
        names = (asked if n == 1 else asked.with_name(f"{asked.name}-{n}") for n in count(1))
        folder = next(name for name in names if _is_free(name, config, held))
        if folder != asked:
            _move_logs(asked, folder)
            log.warning("%s is another run's, so that this one goes to %s", asked, folder)
        yield folder


def _is_free(folder: Path, config: Mapping[str, Any], held: ExitStack) -> bool:
    """Whether this run may have a folder, whose lock is then held."""
    writable_folder(folder, "hydra.run.dir")
    with ExitStack() as attempt:
        try:
            attempt.enter_context(lock.hold(folder / LOCK, waiting=lock.refuse))
        except lock.Held:
            return False
        if holds_another(folder, config):
            return False
        held.push(attempt.pop_all())
    return True


def _move_logs(old: Path, new: Path) -> None:
    """What is logged from now on to a file in the one folder goes to a file of that name in the other."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == old:
            handler.close()
            handler.baseFilename = str(new / Path(handler.baseFilename).name)
