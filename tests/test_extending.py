"""What docs/extending.md shows is written down as it stands there, and works."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composing import composed, resolve
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING

import sddx
from sddx.models import families
from sddx.records import Cut, Example
from sddx.runtime import Runtime
from sddx.store import Store
from sddx.students.trial import try_out
from sddx.train import check_settings

PAGE = Path(sddx.__file__).parents[1] / "docs/extending.md"
BLOCKS = re.findall(r"```(?:python|yaml)\n# (.*?)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
SHOWN = dict(BLOCKS)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files that the page shows, from which Python imports; no module of another test has their
    names, before or after."""
    modules = [name.removesuffix(".py") for name in SHOWN if name.startswith("my_") and name.endswith(".py")]
    for name, text in SHOWN.items():
        if name.startswith("my_"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
    rows = [json.dumps({"question": f"What is {n} + 1?", "answer": str(n + 1)}) for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in modules:
        sys.modules.pop(name, None)
    yield tmp_path
    for name in modules:
        sys.modules.pop(name, None)


def test_no_two_blocks_have_one_name() -> None:
    assert len(SHOWN) == len(BLOCKS)


def test_the_settings_of_ones_own_files_are_checked_like_ours(mine: Path) -> None:
    """A right configuration passes, and a name that the function lacks is refused."""
    for given in (["loss=focal", "pruning=growth"], ["+loss/term@loss.terms.focal=focal", "pruning/metric=growth"]):
        with composed(*given, "dataset=mine", "validation=4", config_dir=mine / "my_conf") as cfg:
            config = resolve(cfg)
        assert config["pruning"]["metric"]["_target_"] == "my_metrics.growth"
        check_settings(config)
    config["loss"]["terms"]["focal"]["loss"]["gama"] = 1
    with pytest.raises(sddx.errors.UserError, match="gama"):
        check_settings(config)


def test_the_loss_is_one_value_a_token_and_without_focus_the_cross_entropy(mine: Path) -> None:
    focal = importlib.import_module("my_losses").focal
    logits, labels = torch.randn(5, 7, dtype=torch.float64), torch.arange(5)
    plain = cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(focal(logits, labels, gamma=0.0), plain)
    assert (focal(logits, labels) <= plain).all()


def test_the_metric_is_one_value_a_sequence_and_unit_and_padding_does_not_count(mine: Path) -> None:
    growth = importlib.import_module("my_metrics").growth
    states, mask = [torch.randn(2, 6, 4) for _ in range(4)], torch.ones(2, 6)
    mask[1, 4:] = 0
    found = growth(states, mask)
    torch.testing.assert_close(found[1:], growth([state[1:, :4] for state in states], mask[1:, :4]))
    assert found.shape == (2, 3)


def test_the_family_is_proven_by_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it branches are removed and the proof holds."""
    entry = eval("{" + SHOWN["an entry of FAMILIES"] + "}", vars(families).copy())
    ((name, family),) = entry.items()
    monkeypatch.setitem(families.FAMILIES, name, family)
    cut = Cut(kept=(0, 2, 3), total=4, no_attention=(2,), no_feedforward=(3,))
    assert try_out(CONFIG_MAPPING[name](num_hidden_layers=4), cut, "eager")


def test_the_stage_is_built_once_and_anew_for_another_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the property of `Run` that makes it, with a check that finds nothing."""
    shards = tmp_path / "data" / "shards"
    shards.mkdir(parents=True)
    rows = [Example(id=str(n), prompt="p", response="word " * n, origin="reference") for n in (2, 4, 9)]
    (shards / "00000.jsonl").write_text("".join(json.dumps(vars(row)) + "\n" for row in rows), encoding="utf-8")
    code = {name: SHOWN[f"sddx/stages/lengths/{name}.py"] for name in ("run", "check", "cost")}
    for name, text in code.items():
        (tmp_path / f"lengths_{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    stage = importlib.import_module("lengths_run").lengths
    store = Store(tmp_path / "store")
    data = store.source("data", tmp_path / "data")
    built = [store.build(stage, {"data": data}, runtime=Runtime(), least=least) for least in (5, 5, 3)]
    assert built[0] == built[1] != built[2]
    assert json.loads((built[0].path / "lengths.json").read_text()) == {"mean": 5, "short": 2}
    assert importlib.import_module("lengths_check").of_settings({}) == []
    cost, rows = importlib.import_module("lengths_cost"), SimpleNamespace(count=3, answer=2.0)
    plan = SimpleNamespace(rows=rows, config={"dataset": {}}, unpruned=None, part=lambda *given: given)
    assert [(each[0], each[-1].read) for each in cost.parts(plan)] == [("lengths", 6.0)]
    assert cost.peak(plan) is None
    scope: dict = {"cached_property": property, "Artifact": object}
    exec(SHOWN["a property of Run in sddx/pipeline.py"], scope)
    made = SimpleNamespace(data=data, _make=lambda name, inputs, **spec: (name, inputs, spec))
    assert scope["lengths"].fget(made) == ("lengths", {"data": data}, {"least": 5})
