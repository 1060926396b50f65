"""Laws of the loggers: each holds every number that was logged, what one would refuse is told before any work, and
none of them changes a number or a key."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import wandb
from composing import composed
from lightning.pytorch.loggers import Logger
from wandb_file import history

from sddx import tracking
from sddx.config import SURROUNDINGS, check, resolve
from sddx.errors import UserError
from sddx.pipeline import Method
from sddx.report import workspace
from sddx.tracking import Tracked, loggers, made, open_tracker
from sddx.train import settings

ALL = "logger=[wandb,csv,tensorboard,mlflow]"
NODE = {
    "_target_": "sddx.tracking.loggers.wandb", "_partial_": True, "project": "sddx", "entity": None, "group": None,
    "tags": [], "mode": "offline",
}  # fmt: skip
ROWS = [
    {"prepare/rows": 40},
    *({"step": step, "train/loss": 1 / step, "train/word": "no number"} for step in (1, 2, 3)),
    {"step": 3, "validation/loss": 0.25},
]
LOSSES = [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def require(node: dict) -> None:
    tracking.require({"wandb": node})


def mine(tracked: Tracked, **settings: object) -> None:
    """A logger of the user's own, switched off."""


def nodes(*given: str) -> dict:
    """The loggers that these settings choose, of a configuration that is sound."""
    with composed(*given) as cfg:
        config = resolve(cfg)
    check(config, Method, also=SURROUNDINGS)
    return config["logger"]


def logged(folder: Path, *given: str, name: str = "a-run") -> None:
    """The rows and a summary through the loggers of these settings, in a run's folder."""
    used = made(nodes(*given), Tracked(folder, "identity", name))
    with open_tracker(folder, {"seed": 0, "loss/term@x": "focal", "name": name}, list(used.values())) as tracker:
        for row in ROWS:
            tracker.log(row)
        tracker.summarise({"recovery": 0.5, "loss": "sdd", "nothing": None})


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What W&B finds of a login: `found`, or the error that it raises; and how often it was asked."""
    state: dict = {"found": False, "asked": 0}

    def answer(**given: object) -> bool:
        assert given == {"prompt": False, "verify": False}  # nobody sits there to answer
        state["asked"] += 1
        if isinstance(state["found"], Exception):
            raise state["found"]
        return state["found"]

    monkeypatch.setattr(wandb, "login", answer)
    loggers._no_login.cache_clear()
    yield state
    loggers._no_login.cache_clear()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"project": "a b:c?"}, "cannot contain"),
        ({"project": "x" * 200}, "exceeded 128"),
        ({"tags": [""]}, "Tag at index 0 is empty"),
        ({"tags": ["x" * 70]}, "70 characters"),
    ],
)
def test_what_wandb_refuses_is_told_before_work(given: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        require(NODE | given)
    require(NODE | given | {"mode": "disabled"})
    require(NODE | given | {"_target_": "test_tracking.mine"})  # of which nothing is known


def test_online_needs_a_login_and_asks_once(login: dict) -> None:
    require(NODE)
    assert login["asked"] == 0
    for _ in range(2):  # each cell of a sweep
        with pytest.raises(UserError, match="no login here.*wandb.mode=offline needs none"):
            require(NODE | {"mode": "online"})
    assert login["asked"] == 1


def test_a_login_that_is_none_is_told_and_one_that_is_there_will_do(login: dict) -> None:
    login["found"] = wandb.errors.AuthenticationError("API key must have 40+ characters.")
    with pytest.raises(UserError, match="40. characters. Run"):
        require(NODE | {"mode": "online"})
    loggers._no_login.cache_clear()
    login["found"] = True
    require(NODE | {"mode": "online"})


def test_tags_may_be_numbers(tmp_path: Path) -> None:
    require(NODE | {"tags": [1, 2.5, "a"]})
    (logger,) = made({"wandb": NODE | {"tags": [1, 2.5, "a"]}}, Tracked(tmp_path, "id", "name")).values()
    assert logger._asked["tags"] == ["1", "2.5", "a"]


def test_each_logger_holds_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back from what each wrote: every number at its step, the settings, and the final numbers."""
    from mlflow.tracking import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logged(tmp_path, ALL, "wandb.tags=[a]", "wandb.group=g")
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "train/loss"]
    assert [(int(row["step"]), float(row["value"])) for row in rows] == LOSSES
    with (tmp_path / "csv/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["train/loss"])) for row in rows if row["train/loss"]] == LOSSES
    assert (rows[-1]["step"], rows[-1]["recovery"], rows[0]["prepare/rows"]) == ("3", "0.5", "40")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == LOSSES
    assert board.Scalars("recovery")[0].value == 0.5 and "_hparams_/experiment" in board.summary_metadata
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("sddx").experiment_id])
    found = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((each.step, each.value) for each in found) == LOSSES
    assert run.data.params["seed"] == "0" and run.data.metrics["recovery"] == 0.5
    assert run.data.tags.items() >= {"a": "true", "group": "g", "mlflow.runName": "a-run"}.items()
    assert run.info.status == "FINISHED" and run.info.artifact_uri.startswith((tmp_path / "mlruns").as_uri())
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    kept = history(file)
    assert [(row["step"], row["train/loss"]) for row in kept if "train/loss" in row] == LOSSES


def test_a_repeated_run_is_the_same_run(tmp_path: Path) -> None:
    """In MLflow it goes on, whatever it is called now; in TensorBoard and CSV it takes the place of the first."""
    from mlflow.tracking import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    uri = f"sqlite:///{tmp_path}/m.db"
    for name in ("first", "second"):
        logged(tmp_path, "logger=[csv,tensorboard,mlflow]", f"logger.mlflow.uri={uri}", name=name)
    client = MlflowClient(uri)
    assert len(client.search_runs([client.get_experiment_by_name("sddx").experiment_id])) == 1
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == LOSSES
    with (tmp_path / "csv/metrics.csv").open() as file:
        assert sum(bool(row["train/loss"]) for row in csv.DictReader(file)) == 3


def test_what_raises_is_finished_as_failed(tmp_path: Path) -> None:
    class Mine(Logger):
        name = version = None
        told: list = []

        def log_metrics(self, metrics: dict, step: int | None = None) -> None:
            self.told.append((metrics, step))

        def log_hyperparams(self, params: dict) -> None:
            self.told.append(params)

        def finalize(self, status: str) -> None:
            self.told.append(status)

    with pytest.raises(ValueError), open_tracker(tmp_path, {"seed": 0}, [Mine()]) as tracker:
        tracker.log(ROWS[1])
        tracker.summarise({"recovery": 0.5, "loss": "sdd"})
        raise ValueError
    assert Mine.told == [{"seed": 0}, ({"train/loss": 1.0}, 1), ({"recovery": 0.5}, 1), "failed"]


def test_loggers_change_no_key_and_are_no_choice() -> None:
    """One, several, or none: what decides results, and what tells runs apart, is the same."""
    found = []
    for given in ([], ["logger=none"], ["logger=csv", "wandb.mode=disabled"], [ALL, "logger.wandb.project=mine"]):
        with composed(*given) as cfg:
            found.append(resolve(cfg))
    assert [sorted(config["logger"]) for config in found] == [
        ["wandb"], [], ["csv"], ["csv", "mlflow", "tensorboard", "wandb"]
    ]  # fmt: skip
    assert all(settings(config) == settings(found[0]) for config in found)
    assert all(config["choices"] == found[0]["choices"] for config in found)
    assert found[-1]["logger"]["wandb"]["project"] == "mine" and found[-1]["wandb"]["project"] == "sddx"


def test_settings_of_wandb_are_one_thing_under_two_names() -> None:
    """A mistake in them is told once, by the name that it was made under."""
    for given in ("wandb.mode=on", "logger.wandb.mode=on"):
        with pytest.raises(UserError, match=rf"1 mistake[^/]*  - {given.partition('=')[0]}='on' must be offline"):
            nodes(given)
    assert nodes("wandb.project=mine")["wandb"]["project"] == "mine"
    assert made(nodes("wandb.mode=disabled"), Tracked(Path("x"), "id", "name")) == {}


@pytest.mark.parametrize(
    ("logger", "lacking"),
    [("tensorboard", "tensorboard"), ("mlflow", "mlflow"), ("mlflow", "sqlalchemy")],
)
def test_a_library_that_lacks_is_told_before_work(logger: str, lacking: str, monkeypatch) -> None:
    given = nodes(f"logger={logger}")
    tracking.require(given)
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == lacking else True)
    with pytest.raises(UserError, match=rf"logger={logger} needs {lacking}: pip install 'sddx\[{logger}\]'"):
        tracking.require(given)
    if lacking == "sqlalchemy":  # which a server has
        tracking.require(nodes("logger=mlflow", "logger.mlflow.uri=http://there"))


def test_a_logger_of_lightnings_own_goes_in_as_it_is(tmp_path: Path) -> None:
    """Any class of it by its settings, or a function that is told what it is to log; nothing else."""
    node = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path), "name": "theirs"}
    tracking.require({"mine": node})
    (used,) = made({"mine": node}, Tracked(tmp_path, "id", "name")).values()
    with open_tracker(tmp_path, {}, [used]) as tracker:
        tracker.log(ROWS[1])
    assert "train/loss" in (tmp_path / "theirs/version_0/metrics.csv").read_text()
    for wrong, said in (
        ({"_target_": "pathlib.Path"}, "is no logger of Lightning's"),
        ({"_target_": "sddx.data.checkers.exact", "_partial_": True}, "is called with 1 value"),
    ):
        with pytest.raises(UserError, match=said):
            tracking.require({"mine": wrong})
    with pytest.raises(UserError, match="makes a list, and a logger of Lightning's is needed"):
        made({"mine": {"_target_": "builtins.list"}}, Tracked(tmp_path, "id", "name"))


def test_a_finished_cell_is_logged_again_into_its_own_folder_alone(tmp_path: Path) -> None:
    """Where runs are gathered from everywhere it would stand twice."""
    given = nodes(ALL, f"logger.mlflow.uri=sqlite:///{tmp_path}/m.db")
    assert sorted(made(given, Tracked(tmp_path, "id", "name"), seen=given)) == ["csv", "tensorboard"]


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--entity", "a/b"], "--entity 'a/b'"), (["--entity", "me", "--project", ""], "--project ''")],
)
def test_the_dashboard_is_refused_in_a_sentence(given: list[str], said: str, login: dict, capsys) -> None:
    assert workspace.main(given) == 2 and said in capsys.readouterr().err
    assert workspace.main(["--entity", "me"]) == 2 and "no login here" in capsys.readouterr().err
