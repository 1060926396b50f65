"""Laws of the search for how much of either student each block of a merge takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from composing import SMALL, composed, resolve

from sddx.config.build import build
from sddx.errors import UserError
from sddx.merging import methods
from sddx.merging.methods import Place
from sddx.merging.search import Blocks, Slopes, Trials, plain_shares, with_shares
from sddx.pipeline import Run
from sddx.report import table
from sddx.runtime import Runtime
from sddx.stages.cost import estimated
from sddx.stages.shares import run as stage
from sddx.store import Store
from sddx.train import look, method, run, verify

PLAIN = (0.5,) * 6


def searched(search: Slopes | Blocks, target: tuple[float, ...]) -> Trials:
    """What is judged where the score falls with the squared distance to a target."""
    trials = Trials(lambda shares: -sum((a - b) ** 2 for a, b in zip(shares, target, strict=True)), {})
    trials(PLAIN)
    search(trials, PLAIN)
    return trials


def test_slopes_are_lines_between_nothing_and_all() -> None:
    trials = searched(Slopes(levels=[0.2, 0.5], slopes=[-0.4, 0.0, 1.0]), PLAIN)
    lines = list(trials.scores)
    assert len(lines) == 6 and trials.best == PLAIN  # judged once, although it is one of them
    assert lines[1] == pytest.approx((0.4, 0.32, 0.24, 0.16, 0.08, 0.0))
    assert lines[3] == (0.0, 0.0, 0.1, 0.3, 0.5, 0.7)
    assert lines[-1] == pytest.approx((0.0, 0.2, 0.4, 0.6, 0.8, 1.0))


@pytest.mark.parametrize("seed", range(3))
def test_blocks_reach_a_peak_that_their_steps_lead_to(seed: int) -> None:
    """And stop there: each block's share was tried on both sides, and none scored higher."""
    target = (0.0, 0.0, 0.75, 0.75, 1.0, 1.0)
    trials = searched(Blocks(step=0.25, together=2, budget=100, seed=seed), target)
    assert trials.best == target and len(trials.scores) < 30


@pytest.mark.parametrize("budget", [1, 4, 7])
def test_a_search_keeps_to_its_budget_and_never_chooses_worse_than_the_plain_merge(budget: int) -> None:
    trials = searched(Blocks(step=0.1, together=1, budget=budget, seed=0), (0.9,) * 6)
    assert 1 < len(trials.scores) <= 1 + budget
    assert trials.scores[trials.best] >= trials.scores[PLAIN]
    assert list(trials.scores) == list(searched(Blocks(0.1, 1, budget, 0), (0.9,) * 6).scores)
    flat = Trials(lambda shares: 0.5, {})
    flat(PLAIN)
    Blocks(step=0.1, together=1, budget=budget, seed=0)(flat, PLAIN)
    assert flat.best == PLAIN


def test_what_was_judged_before_is_not_judged_again() -> None:
    trials = Trials(lambda shares: pytest.fail("judged again"), {PLAIN: 0.3, (0.1,) * 6: 0.9})
    assert trials(PLAIN) == 0.3 and list(trials.scores) == [PLAIN]


@pytest.mark.parametrize("name", ["slerp", "linear", "task_arithmetic"])
def test_shares_are_those_of_the_second_student(name: str) -> None:
    """In a block its own, elsewhere their mean; every method takes them as its own setting."""
    base, x, y = (
        torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(3)
    )
    y = x + 1e-4 * y  # where an arc is a line
    setting = {"t": 0.5} if name == "slerp" else {"weights": None}
    node = {"_target_": f"sddx.merging.methods.{name}", "_partial_": True, **setting}
    merge = build(with_shares(node, (0.0, 0.25, 0.8)))
    for block, share in ((0, 0.0), (1, 0.25), (2, 0.8), (None, 0.35)):
        merged, _ = merge([x, y], base, Place("weight", block))
        torch.testing.assert_close(merged, x + share * (y - x))
    assert plain_shares(node, 3) == (0.5, 0.5, 0.5)
    assert getattr(methods, name)


SEARCHED = (
    *SMALL,
    "loss=sft",
    "+merging=slerp",
    "merging.students=['dataset=tiny_arithmetic','dataset=tiny_comparison']",
    "+merging/search=slopes",
    "merging.search.by.levels=[0.3]",
    "merging.search.evaluation.tasks=[tiny_arithmetic_selection,tiny_comparison_selection]",
    "merging.search.evaluation.limit=4",
)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["merging.students=['seed=0','seed=1','seed=2']"], "goes between two students, and there are 3"),
        (
            ["merging.search.evaluation.tasks=[tiny_arithmetic]"],
            "the items of tiny_arithmetic.* are for the report",
        ),
        (
            ["+merging.search.evaluation.side=selection", "merging.search.evaluation.tasks=[tiny_facts]"],
            "merging.search.evaluation.side=selection chooses by items of tiny_facts on which evaluation.side=null",
        ),
        (
            [f"merging.search.evaluation.{each}" for each in ("tasks=[tiny_facts]", "split={tiny_facts: report}")],
            "chooses by items of tiny_facts on which evaluation.side=null reports too",
        ),
        (["merging.search.evaluation.backend=vllm"], "Use merging.search.evaluation.backend=hf"),
        (["merging.search.by.levels=[2]"], r"merging.search.by.levels"),
        (["merging.search.evaluation.tasks=[no_selection]"], "no_selection"),
        (["merging=linear", "merging.method.weights=[1,1]"], "Leave merging.method.weights at null"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_work(given: list[str], said: str) -> None:
    linear = given[0] == "merging=linear"
    asked = [each for each in SEARCHED if not (linear and each == "+merging=slerp")]
    with composed(*asked, *(["+merging=linear", *given[1:]] if linear else given)) as cfg:
        config = resolve(cfg)
    with pytest.raises(UserError, match=said):
        verify(config)


def test_a_run_goes_on_with_a_search_and_merges_by_what_scores_highest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after two candidates, it judges the others; the merged model is that of its shares, and the
    table says how it was chosen. A plan counts every candidate."""
    judged, score = [], stage._score

    def counted(folder: Path, *arguments, **options) -> float:
        if len(judged) == 2 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        judged.append(folder)
        score(folder, *arguments, **options)
        return 0.1 * len(judged) if len(judged) < 4 else 0.2

    monkeypatch.setattr(stage, "_score", counted)
    with composed(*SEARCHED, f"store={tmp_path / 'store'}") as cfg:
        config = resolve(cfg)
        verify(config)
    here = Run(Store(tmp_path / "store"), Runtime(quiet=True), method(config))
    with pytest.raises(KeyboardInterrupt):
        _ = here.merged
    (tmp_path / "again").touch()
    summary = json.loads(run(config, tmp_path / "run").read_text())
    record = summary["searched"]
    assert len(judged) == 4 and len(record["candidates"]) == 4
    assert record["plain"] == 0.1 and record["score"] == pytest.approx(0.3)
    assert record["shares"] == pytest.approx([0.3] * 9)
    assert any("0.3 0.3" in text and "best of 4" in text for _, text in table.lines(summary))
    plain = with_shares(config["merging"]["method"], record["shares"])
    with composed(*SEARCHED, f"store={tmp_path / 'store'}") as cfg:
        other = method(resolve(cfg) | {"merging": {**config["merging"], "method": plain, "search": None}})
    one, two = (
        Run(Store(tmp_path / "store"), Runtime(quiet=True), each).merged for each in (method(config), other)
    )
    assert one and two and one.key != two.key
    assert (one.path / "model.safetensors").read_bytes() == (two.path / "model.safetensors").read_bytes()
    parts = {part.stage: part for part in estimated(config).parts()}
    assert parts["shares"].reading > 0
    assert "shares" in {step.stage for step in look(config | {"store": str(tmp_path / "empty")}).steps}
