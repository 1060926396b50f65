"""Every command that README and docs show is one: its settings are checked as a run's would be, or it is known."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from hydra.core.override_parser.overrides_parser import OverridesParser

import sddx
from sddx.commands.__main__ import COMMANDS
from sddx.config import CONF, resolve
from sddx.train import check_settings

ROOT = Path(sddx.__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [
    path
    for folder in ("sddx", "conf", "sweeps", "tests", "benchmarks", "notebooks", "docs", ".github")
    for suffix in ("py", "yaml", "yml", "md", "ipynb", "html")
    for path in sorted((ROOT / folder).rglob(f"*.{suffix}"))
] + [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml", "CITATION.cff")]
ELSEWHERE = {"table.md", "report.md", "agreement.md", "USE_POLICY.md"}  # in folders of runs, and of models
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


def test_every_command_has_its_line() -> None:
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert all(f"| `sddx {name}` |" in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("page", "groups"),
    [
        ("commands", "model pruning/patch dataset loss tuning generation trainer evaluation"),
        ("pruning", "pruning"),
        ("merging", "merging merging/search"),
        ("drafts", "speculation"),
        ("drift", "drift"),
        ("sweeps", "sweeps hydra/launcher"),
    ],
)
def test_every_option_is_named_on_the_page_of_its_group(page: str, groups: str) -> None:
    """All but `base`, which the others rest on."""
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    options = {path.stem for group in groups.split() for path in (CONF / group).glob("*.yaml")} - {"base"}
    assert not {name for name in options if f"`{name}`" not in text and f"`{name} " not in text}


def test_commands_are_found() -> None:
    assert len(commands()) > 40 and {"train", "plan", "fetch", "store"} <= {name for _, name, _ in commands()}


class Understood(Exception):
    """A command has parsed its arguments, and is stopped there."""


def stopped(parse: Callable[..., Any]) -> Callable[..., Any]:
    def parsed(*arguments: Any, **named: Any) -> Any:
        parse(*arguments, **named)
        raise Understood

    return parsed


@pytest.mark.parametrize(("page", "name", "given"), [each for each in commands() if each[1] not in COMPOSED])
def test_a_command_takes_its_arguments(page: str, name: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own parser, before any work. A name alone is no command line, and pretraining has settings."""
    assert name in COMMANDS
    if not given or name == "pretrain":
        return
    module = import_module(COMMANDS[name][0])
    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(ArgumentParser, method, stopped(getattr(ArgumentParser, method)))
    if hasattr(module, "plain_arguments"):
        monkeypatch.setattr(module, "plain_arguments", stopped(module.plain_arguments))
    with pytest.raises(Understood):
        module.main(shlex.split(given))


@pytest.mark.parametrize("given", sorted({given for _, name, given in commands() if name in COMPOSED}))
def test_the_settings_of_a_command_are_those_of_a_run(given: str) -> None:
    """On whichever pages it stands. Of a grid, its first cell. One with a folder of the reader's own settings needs
    that."""
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


def test_no_file_cites_a_document_that_is_not_here() -> None:
    """Pages are named from the root, or from where the file stands."""
    missing = []
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        named = {
            match
            for match in re.findall(r"(?<![\w/.*])[\w./-]*\w\.md\b", text)
            if Path(match).name not in ELSEWHERE
        }
        missing += [
            (path.name, name) for name in named if not any((at / name).exists() for at in (ROOT, path.parent))
        ]
        missing += [(path.name, found) for found in re.findall(r"(?i)\b(?:facts|pitfalls?) [A-H]\d?\b", text)]
    assert not missing


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.M
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in (link for link in links if "://" not in link):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists() and (not anchor or anchor in anchors(target)), link


def test_every_page_is_reached_from_the_readme() -> None:
    """Over links from page to page."""
    reached, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8"))
        left += [
            to for link in links if (to := (page.parent / link).resolve()) not in reached and "://" not in link
        ]
    assert {path for path in PAGES if path.is_relative_to(ROOT / "docs")} <= reached
