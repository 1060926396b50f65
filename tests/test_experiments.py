"""What the shipped experiments and the paper's grids promise: what their headers say, and a fair comparison."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import product

import pytest
import yaml
from composing import composed, resolve

from sddx.config import CONF
from sddx.config.shared import sharing
from sddx.estimate.devices import DEVICES
from sddx.estimate.show import hours
from sddx.report.law import FOR_INTERVAL
from sddx.stages.cost import estimated

FILES = {path.stem: path.read_text() for path in sorted((CONF / "experiment").glob("*.yaml"))}
EXPERIMENTS = list(FILES)
# The others are one of these but for blocks and model, setting by setting (test_rehearse).
OF_THEIR_OWN = [name for name, text in FILES.items() if "override /model" in text]
WRITERS = sorted(path.stem for path in (CONF / "generation").glob("*.yaml"))
PLANNED = "Hours: about {:.1f} by sddx.commands.plan for an H100, not measured. Not yet run."


def cells(sweep: str) -> Iterator[dict[str, str]]:
    """The settings of every cell of a file of sweeps/."""
    sweeper = yaml.safe_load((CONF / "sweeps" / f"{sweep}.yaml").read_text())["hydra"]["sweeper"]
    for grid in sweeper.get("grids", [{}]):
        settings = {**sweeper.get("params", {}), **grid}
        for values in product(*(str(values).split(",") for values in settings.values())):
            yield dict(zip(settings, values, strict=True))


def planned(command: str) -> float:
    """Hours on an H100, by plan, of a command in a header."""
    given = [word for word in command.split() if "=" in word]
    sweep = next((word.partition("=")[2] for word in given if word.startswith("+sweeps=")), None)
    estimates = []
    for cell in cells(sweep) if sweep else [{}]:
        with composed(*given, *(f"{name}={value}" for name, value in cell.items())) as cfg:
            estimates.append(estimated(resolve(cfg)))
    found = hours(estimates, DEVICES["h100"])
    assert found is not None
    return found


@pytest.fixture(scope="module")
def grid() -> Iterator[None]:
    """What is planned is planned as the cells of one grid are."""
    with sharing():
        yield


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_header_says_what_the_experiment_is(experiment: str, grid: None) -> None:
    """Its source, its own command, hardware, and hours: measured, not yet, or within 15 % of the plan's."""
    lines = FILES[experiment].splitlines()
    header = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    for label in ("Source: ", "Hardware: ", "Hours: ", "Expected: "):
        assert label in header, f"{experiment} does not say {label}"
    (command,) = re.findall(r"Command: python -m sddx\.train((?: \S+=\S+| --multirun)+)", header)
    assert f"+experiment={experiment}" in command.split()
    if re.search(r"Hours: ([\d.]+, measured on |not measured yet)", header):
        return
    should = planned(command)
    said = re.search(re.escape(PLANNED).replace(re.escape("{:.1f}"), r"([\d.]+)"), header)
    assert said, f"{experiment} must say: {PLANNED.format(should)}"
    assert float(said[1]) == pytest.approx(should, rel=0.15), f"{experiment} must say: {PLANNED.format(should)}"


@pytest.mark.parametrize("experiment", OF_THEIR_OWN)
def test_who_writes_does_not_change_how_long_answers_may_be(experiment: str) -> None:
    """The backend is no part of the science."""
    found = []
    for writer in WRITERS:
        with composed(f"+experiment={experiment}", f"generation={writer}") as cfg:
            found.append(cfg.generation.max_new_tokens)
            learns = bool(cfg.loss.terms)
    assert len(set(found)) == 1 and (found[0] == 512 or not learns)


@pytest.mark.parametrize("sweep", ["paper_blocks", "paper_sizes"])
def test_the_papers_grids_compare_fairly(sweep: str) -> None:
    """Both arms stand at every place with the same seeds, as many as a claim takes, each at its own rate."""
    places, rates = defaultdict(lambda: defaultdict(set)), defaultdict(set)
    for cell in cells(sweep):
        arm, seed, rate = (cell.pop(name) for name in ("loss", "seed", "trainer.learning_rate"))
        places[tuple(cell.items())][arm].add(seed)
        rates[arm].add(rate)
    assert rates == {"sft": {"${rates.sft}"}, "sdd": {"${rates.sdd}"}}
    for arms in places.values():
        assert arms["sft"] == arms["sdd"] and len(arms["sft"]) >= FOR_INTERVAL[1]


def test_the_papers_grids_hold_what_a_claim_takes() -> None:
    """Block counts at equal examples and at equal tokens; sizes enough for a law in every data set; rates chosen on
    selection items, with seeds that are in no report."""
    assert {cell["trainer.budget"] for cell in cells("paper_blocks")} == {"examples", "tokens"}
    sizes = defaultdict(set)
    for cell in cells("paper_sizes"):
        sizes[cell["dataset"]].add(cell["dataset.size"])
    assert len(sizes) == 4 and all(len(found) >= FOR_INTERVAL[0] for found in sizes.values())
    rates = list(cells("paper_rates"))
    assert {cell["evaluation"] for cell in rates} == {"selection"}
    reported = {cell["seed"] for sweep in ("paper_blocks", "paper_sizes") for cell in cells(sweep)}
    assert not reported & {cell["seed"] for cell in rates}
    tried = {arm: {c["trainer.learning_rate"] for c in rates if c["loss"] == arm} for arm in ("sft", "sdd")}
    assert tried["sft"] == tried["sdd"] and len(tried["sft"]) >= 3
