"""How a command with a configuration begins and ends: a mistake is told in a sentence, whoever found it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf

from sddx.arguments import near
from sddx.config import CONF, flatten
from sddx.printing import print_anywhere
from sddx.records import UserError

ALL = "All settings: --cfg job."
NO_TEXT = re.compile(r"null|true|false|[-+.\d]+|{.*")


@contextmanager
def mistakes_told() -> Iterator[None]:
    """A UserError in the body is printed, without a traceback, and ends the program with status 2."""
    try:
        yield
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def command(main: Callable[[], None], root: str = "train") -> None:
    """Run a Hydra entry point, whose settings are those of the file `root`; what Hydra refuses of the command line
    is told as every other mistake is."""
    print_anywhere()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra ends the program itself, in its own words
    sys.argv[1:] = sorted(sys.argv[1:], key=_is_setting)  # which Hydra wants side by side, in their order
    with mistakes_told():
        _require_choices(sys.argv[1:])
        try:
            main()
        except HydraException as error:
            raise UserError(_in_our_words(str(error), root)) from None


def _is_setting(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def _require_choices(arguments: list[str]) -> None:
    """Raises UserError for a group that is set to what is no text, at which Hydra ends in a traceback, and for one
    that is emptied."""
    for argument in arguments:
        key, _, values = argument.lstrip("+").partition("=")
        group = key.replace(".", "/")
        wrong = any(map(NO_TEXT.fullmatch, values.split(","))) if group == key else values == "null"
        if wrong and (CONF / group).is_dir():
            raise UserError(f"{argument} chooses nothing. Use {group}= one of {', '.join(_options(group))}.")


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _in_our_words(told: str, root: str) -> str:
    """What Hydra says of a command line, with what the user may have meant and without its search path."""
    if found := re.match("Could not override '(.*)'", told):
        return _unknown(found[1], root)
    if found := re.search("Could not find '(.*)/(.*)'", told):
        group, name = found[1], found[2]
        return f"{group}={name} is not there.{near(name, _options(group), f'{group}=')} {_listed(group)}"
    if told.startswith(("Error parsing override", "LexerNoViableAlt", "mismatched", "no viable", "token recog")):
        return f"{told.splitlines()[0]}. Settings have the form key=value, in quotes where the shell asks. {ALL}"
    return told.partition("Config search path")[0].strip()


def _unknown(key: str, root: str) -> str:
    if (CONF / key).is_dir():
        return f"{key} is chosen with a plus: +{key}=... {_listed(key)}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = flatten(OmegaConf.to_container(compose(root)))  # type: ignore[arg-type]
    groups = [path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()]
    return f"{key} is not a setting.{near(key, [*settings, *groups], '')} {ALL}"


def _listed(group: str) -> str:
    options = _options(group)
    return f"There are {', '.join(options)}." if options else ""


def require_one_run(otherwise: str) -> None:
    """Raises UserError where a file of sweeps/ was given without --multirun, which would do `otherwise`."""
    if "sweeps" in HydraConfig.get().runtime.choices:
        raise UserError(f"A file of sweeps/ describes many runs. Add --multirun to {otherwise}.")


@contextmanager
def without_run_folder(*more: str) -> Iterator[None]:
    """While the body runs, the command line has overrides beside the user's, `more` and those by which Hydra leaves
    nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        sys.argv += [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}", *more]
        yield
