"""Laws of the command line: what it refuses is told in a sentence, with status 2; every command has its help."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import forked
import pytest
from composing import SMALL, composed, resolve
from hydra.core.global_hydra import GlobalHydra

from sddx.commands.__main__ import COMMANDS
from sddx.config.entry import command
from sddx.errors import mistakes_of
from sddx.stages.cost import estimated
from sddx.train import verify

COMPOSED = ("sddx.train", "sddx.commands.plan", "sddx.commands.fetch")
OTHERS = tuple(each for each, _ in COMMANDS.values() if each not in (*COMPOSED, "sddx.tiny.pretrain"))
SAID = {
    "a misspelt setting": ("trainer.learning_rat=1", "Did you mean trainer.learning_rate?"),
    "a misspelt group": ("los=sft", "los is not a setting. Did you mean loss?"),
    "an unknown choice": ("loss=sfd", "loss=sfd is not there. Did you mean loss=sft? There are jsd, kd,"),
    "an unknown experiment": ("+experiment=llama_26", "Did you mean experiment=llama_26L?"),
    "a group without its plus": ("experiment=llama_26L", "experiment is chosen with a plus: +experiment=..."),
    "a group twice": ("+loss=sft", "Multiple values for loss"),
    "nothing chosen": ("loss=null", "loss=null chooses nothing. Use loss= one of jsd, kd,"),
    "a number chosen": ("dataset=3", "dataset=3 chooses nothing. Use dataset= one of alpaca,"),
    "nothing chosen inside": (
        "pruning.patch=null",
        "pruning.patch=null chooses nothing. Use pruning/patch=",
    ),
    "an inner group emptied": ("evaluation.vllm=null", "Use evaluation/vllm= one of default."),
    "no value": ("trainer.steps", "Settings have the form key=value"),
    "a space": ("a b", "Settings have the form key=value"),
    "an open bracket": ("seed=[1", "Settings have the form key=value"),
    "a new setting": ("+foo=1", "foo is not a setting. Known here:"),
    "what is owed": ("model=local", "These settings have no value: model.path."),
    "a dead reference": (
        "seed=${no.such}",
        "do not go together: Interpolation key 'no.such' not found (in seed).",
    ),
}


def run(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The exit status of a command that reads its configuration from conf/."""
    monkeypatch.setattr(sys, "argv", ["sddx", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # as it was, afterwards
    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers])  # Hydra replaces them
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as ended:
        command(main)
    return ended.value.code


def test_a_setting_of_one_option_is_shown_its_place_in_a_sweep_over_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Hydra sets what does not vary before it knows what the sweep chooses."""
    import_module("sddx.train").install()
    main, beta = import_module("sddx.train").main, "loss.terms.jsd_beta.loss.beta"
    where = (f"hydra.sweep.dir={tmp_path}", f"store={tmp_path}", "--multirun")
    for chosen, key in (
        ("loss=on_policy,on_policy_guided", beta),
        ("+merging=slerp,ties", "merging.method.t"),
        ("pruning/patch=linear,none", "pruning.patch.fit.ridge"),
    ):
        assert run(main, monkeypatch, chosen, f"{key}=0", *where) == 2
        place = f"'hydra.sweeper.grids=[{{{chosen.lstrip('+').partition('=')[0]}: ..., {key}: ...}}]'"
        assert place in capsys.readouterr().err
    assert run(main, monkeypatch, "loss=sft,sdd", "trainer.step=1", *where) == 2
    told = capsys.readouterr().err
    assert "Did you mean trainer.steps?" in told and "grids" not in told
    grids = f'hydra.sweeper.grids=[{{loss: "on_policy,on_policy_guided", {beta}: "0,1"}}]'
    command_line = ["sddx", grids, "dry_run=true", *where]
    monkeypatch.setattr(sys, "argv", command_line)
    GlobalHydra.instance().clear()
    command(main)
    assert "4 cells" in capsys.readouterr().out


@pytest.mark.parametrize("name", SAID)
def test_what_hydra_refuses_is_told_as_every_other_mistake(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    given, said = SAID[name]
    import_module("sddx.train").install()
    main = import_module("sddx.train").main
    assert run(main, monkeypatch, given, f"hydra.run.dir={tmp_path}", f"store={tmp_path}") == 2
    told = capsys.readouterr().err
    assert said in told and told.startswith("\nerror: ")
    assert "Traceback" not in told and "HYDRA_FULL_ERROR" not in told and "provider=" not in told


@pytest.mark.parametrize("given", ["los=sft", "loss=sfd", "trainer.budget=token"])
def test_a_grid_is_told_so_too(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import_module("sddx.train").install()
    main = import_module("sddx.train").main
    grid = ("--multirun", "seed=0,1", "~trainer.keep", f"hydra.sweep.dir={tmp_path}", f"store={tmp_path}")
    assert run(main, monkeypatch, given, *grid) == 2
    assert "Did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMPOSED[1:])
def test_the_other_composed_commands_say_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = import_module(name)
    main = getattr(module, "_composed", None) or module.main
    assert run(main, monkeypatch, "los=sft", f"hydra.run.dir={tmp_path}") == 2
    assert "Did you mean loss?" in capsys.readouterr().err


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_command_has_help_and_knows_its_arguments(name: str, capsys: pytest.CaptureFixture) -> None:
    """Help ends with status 0, an argument that it does not know with 2, and both without a traceback."""
    main = import_module(name).main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and "sddx" in capsys.readouterr().out
    try:
        status = main(["--no-such-argument"])
    except SystemExit as error:
        status = error.code
    assert status == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", COMPOSED[1:])
def test_the_other_composed_commands_say_what_they_do(name: str, tmp_path: Path) -> None:
    """Before the settings, which are those of a run."""
    told = forked.command(name, "--help", cwd=tmp_path)
    assert told.returncode == 0 and told.stdout.startswith(import_module(name).__doc__)
    assert "trainer" in told.stdout


def test_as_a_program_a_command_checks_as_much(tmp_path: Path) -> None:
    """Types and ranges of the settings at the root, whose schema is then a function of `__main__`."""
    given = ["seed=a", "validation=-5", "max_length=abc", f"hydra.run.dir={tmp_path}"]
    told = forked.command("sddx.train", *given, cwd=tmp_path)
    assert told.returncode == 2 and "3 mistake(s)" in told.stderr
    assert all(name in told.stderr for name in ("seed='a'", "validation=-5", "max_length='abc'"))


def ascii_only(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """What goes from now on to a standard output that carries ASCII alone."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    return written


def test_what_a_composed_command_prints_arrives_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    monkeypatch.setattr(sys, "argv", ["sddx"])
    written = ascii_only(monkeypatch)
    command(lambda: print("99.0 \u00b1 0.6"))
    assert written.getvalue() == b"99.0 \\xb1 0.6\n"


def test_what_any_other_command_prints_arrives_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = ascii_only(monkeypatch)
    (tmp_path / "\u00e4").mkdir()
    assert import_module("sddx.commands.store").main(["--store", str(tmp_path / "\u00e4"), "ls"]) == 0
    assert b"\\xe4" in written.getvalue()


def test_plans_refuse_names_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    plan = import_module("sddx.commands.plan").main
    for given, said in (
        ("evaluation.tasks=[tiny_fact]", "There is no evaluation task 'tiny_fact'"),
        ("evaluation.tasks=[3]", "evaluation.tasks holds 3"),
        ("stages=[train]", "stages=['train'] is not known"),
    ):
        assert run(plan, monkeypatch, given, f"hydra.run.dir={tmp_path}") == 2
        assert said in capsys.readouterr().err


def test_a_scoring_is_checked_for_what_it_runs_and_no_more() -> None:
    """Every metric that is compared, under its own name; not the evaluation, which it does not reach."""
    nowhere = ["evaluation.tasks=[arc_easy]", "+evaluation.data_dir=/nowhere"]
    odd = ["+metrics.odd={_target_: torch.nn.functional.dropout, _partial_: true}"]
    wanting = ["+pruning/metric@metrics.s=shapley_task", "metrics.s.value.tasks=[arc_easy_selection]"]
    for stages, given, said in (
        ("stages=null", nowhere, "evaluation.data_dir=/nowhere"),
        ("stages=[score]", nowhere, None),
        ("stages=[score]", [*nowhere, *odd], "metrics.odd failed when it was tried"),
        ("stages=[score]", wanting, "arc_easy_selection"),
        ("stages=null", odd, None),
    ):
        with composed(*SMALL, stages, *given) as cfg:
            told = mistakes_of([lambda cfg=cfg: verify(resolve(cfg))])
        assert (said in told[0]) if said else not told, told


def test_a_group_of_ones_own_may_leave_out_what_has_a_default() -> None:
    with composed(*SMALL) as cfg:
        config = resolve(cfg)
    for name in ("chat_template", "include", "shots", "max_new_tokens"):
        del config["evaluation"][name]
    verify(config)
    assert estimated(config).parts()


def test_only_a_store_is_looked_into_and_days_are_a_number(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main = import_module("sddx.commands.store").main
    for asked in ("ls", "verify", "gc"):
        assert main(["--store", str(tmp_path / "typo"), asked]) == 2
        assert "There is no store at" in capsys.readouterr().err
    for days in ("-1", "nan", "inf"):
        with pytest.raises(SystemExit, match="2"):
            main(["--store", str(tmp_path), "gc", f"--older-than={days}"])


@pytest.mark.parametrize("name", ["export.__main__", "bench", "compare", "report.__main__", "sweep.__main__"])
def test_a_run_that_is_not_there_is_told(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whatever a command takes a run for."""
    gone = str(tmp_path / "gone")
    given = {
        "export.__main__": [f"run={gone}", f"to={tmp_path / 'to'}"],
        "bench": [f"run={gone}"],
        "compare": [gone, gone],
        "report.__main__": [gone],
        "sweep.__main__": ["status", gone],
    }
    assert import_module(f"sddx.{name}").main(given[name]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and gone in told and "Give" in told
