"""Every experiment runs from end to end on small stand-ins, with all other settings its own: one of each kind is
run, and every other is one of these but for its model and the number of blocks that go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from composing import composed, resolve
from omegaconf import OmegaConf

from sddx.config import CONF
from sddx.errors import UserError
from sddx.estimate.skeleton import shape_of
from sddx.train import run

pytestmark = pytest.mark.runs

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# Few and many blocks go, attention alone goes, a large and a small model's recipe, nothing is trained.
RUN = ("llama2_depth_curve", "llama_22L", "mistral_attention", "qwen3_8b_34L", "smollm2_26L")

FEWER = ("rehearse.rows=16", "rehearse.texts=8", "rehearse.items=4", "rehearse.new_tokens=8")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def rehearsed(experiment: str, store: Path, *given: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The experiment's own configuration, and that of its rehearsal."""
    with composed(f"+experiment={experiment}", "+rehearse=cpu", f"store={store}", *given) as cfg:
        plain = OmegaConf.to_container(cfg, resolve=True)
        return plain, resolve(cfg)  # type: ignore[return-value]


def settings(*given: str) -> dict[str, Any]:
    """The whole configuration under these settings."""
    with composed(*given) as cfg:
        return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


@pytest.mark.parametrize("experiment", sorted({*EXPERIMENTS} - {*RUN}))
def test_an_experiment_that_is_not_run_is_one_that_is_with_other_blocks_or_model(experiment: str) -> None:
    """Setting by setting, so that what the rehearsal of one shows holds for the other."""
    family, _, blocks = experiment.rpartition("_")
    like = {"llama": "llama_22L", "mistral": "llama_22L", "qwen3_8b": "qwen3_8b_34L", "smollm2": "smollm2_26L"}[
        family
    ]
    found = settings(f"+experiment={experiment}")
    remove = found["model"]["dimensions"]["num_hidden_layers"] - int(blocks.removesuffix("L"))
    given = [f"model={found['choices']['model']}"] if family == "mistral" else []
    assert found == settings(f"+experiment={like}", f"pruning.remove={remove}", *given)


@pytest.mark.parametrize("experiment", RUN)
def test_an_experiment_of_each_kind_can_be_rehearsed(experiment: str, store: Path, tmp_path: Path) -> None:
    """All stages run; the cut takes what the experiment's does, out of as many blocks."""
    plain, config = rehearsed(experiment, store, *FEWER)
    summary = json.loads(run(config, tmp_path).read_text())
    lost = summary["no_attention"] if plain["pruning"]["units"] == "attention" else None
    removed = summary["blocks"] - len(summary["cut"]) if lost is None else len(lost)
    assert removed == plain["pruning"]["remove"]
    assert summary["blocks"] == plain["model"]["dimensions"]["num_hidden_layers"]
    assert (summary["steps"] > 0) == bool(plain["loss"]["terms"])
    assert set(summary["scores"]) == {"unpruned", "pruned", *(["recovered"] if plain["loss"]["terms"] else [])}


WIDTHS = {
    "3": "channels wide.* multiple of 8",
    "100": "channels wide.* multiple of 8",
    "0": "rehearse.width=0 must be 1 or more",
    "null": "rehearse.width=null must be a whole number",
}


@pytest.mark.parametrize("width, told", WIDTHS.items())
def test_a_width_that_heads_cannot_share_is_told(width: str, told: str, store: Path) -> None:
    with pytest.raises(UserError, match=told):
        rehearsed("llama_26L", store, f"rehearse.width={width}")


def test_dimensions_that_are_none_are_told(store: Path) -> None:
    with pytest.raises(UserError, match="model.dimensions .* expected int"):
        rehearsed("llama_26L", store, "model.dimensions.num_hidden_layers=abc")


def test_what_is_not_replaced_is_the_experiments(store: Path) -> None:
    """Arm, cut, tuning, lengths, batches, precision, checker and template; and what is replaced is said."""
    given = ("loss=kd", "tuning.rank=4", "trainer.budget=tokens", "trainer.tokens=9")
    plain, config = rehearsed("llama_26L", store, *given)
    for kept in ("loss", "pruning", "tuning", "max_length", "selfdata", "seed"):
        assert config[kept] == plain[kept]
    assert {**config["trainer"], "epochs": 3, "budget": "tokens"} == plain["trainer"]
    for kept in ("check", "rewrite"):
        assert config["dataset"][kept] == plain["dataset"][kept]
    assert any("meta-llama/Llama-3.1-8B-Instruct" in line for line in config["rehearse"])


def test_no_engine_is_asked_for_in_a_rehearsal(store: Path) -> None:
    """Where vLLM writes and evaluates, transformers do, with the experiment's sampling; and it is said."""
    given = ("generation=vllm", "generation.temperature=0.3", "evaluation.backend=vllm")
    _, config = rehearsed("llama_26L", store, *given)
    assert config["evaluation"]["backend"] == "hf"
    like = settings("generation=greedy", "generation.temperature=0.3", "generation.max_new_tokens=16")
    assert config["generation"] == like["generation"]
    assert any("vLLM" in line for line in config["rehearse"])
    assert not any("vLLM" in line for line in rehearsed("llama_26L", store)[1]["rehearse"])


def test_the_stand_in_has_the_models_depth_and_kinds(store: Path) -> None:
    """The same family, as many blocks, the same grouping of heads; and it is made once."""
    plain, config = rehearsed("qwen3_8b_30L", store)
    true, made = shape_of(plain["model"]), shape_of(config["model"])
    assert (made.model_type, made.num_hidden_layers) == (true.model_type, true.num_hidden_layers)
    assert (
        made.num_attention_heads // made.num_key_value_heads == true.num_attention_heads // true.num_key_value_heads
    )
    assert made.layer_types == true.layer_types
    written = Path(config["model"]["path"]).stat().st_mtime_ns
    assert Path(rehearsed("qwen3_8b_30L", store)[1]["model"]["path"]).stat().st_mtime_ns == written


MERGED = ("loss=sft", "+merging=slerp", "merging.students=['dataset=alpaca','seed=1']", *FEWER)


def test_a_merge_is_rehearsed_with_its_students_and_its_search(store: Path, tmp_path: Path) -> None:
    """Each student has the run's stand-ins and rows of its own; all of them are trained, merged and evaluated."""
    searched = ("+merging/search=slopes", "merging.search.by.levels=[0.4]", "merging.search.by.slopes=[0.2]")
    plain, config = rehearsed("smollm2_26L", store, *MERGED, *searched)
    one, two = config["merging"]["students"]
    assert one["model"] == two["model"] == config["model"] != plain["model"]
    assert (one["dataset"]["skill"], two["dataset"]["skill"]) == ("arithmetic", "comparison")
    assert (one["seed"], two["seed"]) == (plain["seed"], 1)
    summary = json.loads(run(config, tmp_path / "run").read_text())
    assert [each["role"] for each in summary["subjects"]] == ["reference", "cut", "student", "parent", "merged"]
    assert len(summary["searched"]["candidates"]) == 2 and len(summary["searched"]["shares"]) == 26


def test_a_finished_student_is_not_rehearsed(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a finished run's folder, whose student is of no stand-in"):
        rehearsed("smollm2_26L", store, *MERGED, f"merging.students=['seed=0','{tmp_path}']")
