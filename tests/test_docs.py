"""Every command that README and docs show is one: its settings are checked as a run's would be, or it is known."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from composing import composed
from hydra.core.override_parser.overrides_parser import OverridesParser

import sddx
from sddx.commands.__main__ import COMMANDS
from sddx.config import resolve
from sddx.train import check_settings

ROOT = Path(sddx.__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
START = re.compile(r"(?:\S*/)?(?:python -m sddx\.train|sddx (?P<name>[a-z]+))\b(?P<rest>.*)")
FENCED = re.compile(r"```bash\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`((?:python -m sddx\.train|sddx [a-z]+)[^`]*)`")
COMPOSED = ("train", "plan", "fetch")


def commands() -> list[tuple[str, str, str]]:
    """(page, name, its arguments) of every command of ours that stands in a block of shell or in a sentence."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in FENCED.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        lines += [" ".join(inline.split()) for inline in INLINE.findall(FENCED.sub("", text))]
        for line in lines:
            for part in re.split(r"&&|;", line):
                if shown := START.search(part):
                    found.append((page.name, shown["name"] or "train", re.split(r"\s#", shown["rest"])[0].strip()))
    return sorted(set(found))


def test_commands_are_found() -> None:
    assert len(commands()) > 40 and {"train", "plan", "fetch", "store"} <= {name for _, name, _ in commands()}


@pytest.mark.parametrize(("page", "name", "given"), [each for each in commands() if each[1] not in COMPOSED])
def test_a_command_is_known(page: str, name: str, given: str) -> None:
    assert name in COMMANDS


@pytest.mark.parametrize(("page", "name", "given"), [each for each in commands() if each[1] in COMPOSED])
def test_the_settings_of_a_command_are_those_of_a_run(page: str, name: str, given: str) -> None:
    """Of a grid, its first cell. One with a folder of the reader's own settings needs that."""
    words = [word for word in shlex.split(given) if word not in ("from=pypi", "…", "...")]
    settings = [word for word in words if not word.startswith("-")]
    if {"--help", "--cfg", "--config-dir"} & set(words) or any("<" in word or "[…" in word for word in words):
        return
    parser = OverridesParser.create()
    single = []
    for override in parser.parse_overrides(settings):
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else None
        prefix = override.input_line.partition("=")[0]
        single.append(f"{prefix}={values[0]}" if values else override.input_line)
    with composed(*single) as cfg:
        config = resolve(cfg)
    check_settings(config)
