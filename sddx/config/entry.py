"""How a command with a configuration begins and ends: a mistake is told in a sentence, whoever found it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sddx.config import CONF, flatten, unresolved
from sddx.config.printing import print_anywhere
from sddx.errors import UserError, near
from sddx.files.naming import shortened

PACKAGE = Path(__file__).parents[1]
COMPOSE = ("entry.py", "sweeper.py", "loading.py")  # of our files, those that pass the command line on to Hydra
CONFIG_DIR = ("--config-dir", "-cd")
ALL = "All settings: --cfg job."
FORM = (
    "Settings have the form key=value; a value with = ( ) [ ] { } , : or a space needs quotes of its own, inside "
    "those of the shell: 'dataset.path=\"a=b.jsonl\"'."
)
GRAMMAR = ("Error parsing override", "LexerNoViableAlt", "mismatched", "no viable", "token recog", "extraneous")
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
    """Run a Hydra entry point, whose settings are those of the file `root`; what is refused before its body begins
    is told as every other mistake is."""
    print_anywhere()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra ends the program itself, in its own words
    sys.argv[1:] = sorted(sys.argv[1:], key=_is_setting)  # which Hydra wants side by side, in their order
    with mistakes_told(), composing(root):
        _require_choices(sys.argv[1:])
        main()


@contextmanager
def composing(root: str = "train") -> Iterator[None]:
    """What Hydra, OmegaConf, YAML and the file system refuse in the body before our own code begins is a UserError
    in our words. What our code raises passes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any kind: Hydra lets through whatever its parts raise
        if _is_ours(error):
            raise
        raise UserError(_in_our_words(error, root)) from error


def _is_ours(error: Exception) -> bool:
    """Whether an exception comes from where our own code had begun."""
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(file.is_relative_to(PACKAGE) and file.name not in COMPOSE for file in files)


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
    """What may be chosen; `base` is what the others have in common."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem != "base")


def _in_our_words(error: Exception, root: str) -> str:
    """What is refused of a command line or a configuration file, with what the user may have meant and without
    Hydra's search path."""
    message = str(error)
    if match := re.match("Could not override '(.*)'", message):
        return _unknown(match[1], root)
    if match := re.search("Could not find '(.*)/(.*)'", message):
        group, name = match[1], match[2]
        return f"{group}={name} is not there.{near(name, _options(group), f'{group}=')} {_listed(group)}"
    if isinstance(error, OmegaConfBaseException):
        open_ended = [argument for argument in sys.argv[1:] if "${" in argument or "???" in argument]
        return unresolved(error) + (f" Given: {', '.join(open_ended)}." if open_ended else "")
    if broken := _broken_files() if isinstance(_root_of(error), (yaml.YAMLError, ValueError)) else []:
        return "\n".join(broken)
    if isinstance(error, HydraException) and message.startswith(GRAMMAR):
        return f"{message.splitlines()[0]}. {FORM} {ALL}"
    if isinstance(error, HydraException):
        return message.partition("Config search path")[0].strip()
    deepest = _root_of(error)
    if isinstance(deepest, OSError) and deepest.filename:
        where = shortened(str(deepest.filename), 120)
        return (
            f"The folder of the run cannot be made: {deepest.strerror} ({where}). Give another "
            "with hydra.run.dir=... (of a sweep: hydra.sweep.dir=...)."
        )
    return f"The command line cannot be used: {str(deepest).splitlines()[0] or type(deepest).__name__}. {ALL}"


def _root_of(error: BaseException) -> BaseException:
    """What an exception began with."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _broken_files() -> list[str]:
    """What is wrong with each file of the user's --config-dir that is no YAML in UTF-8."""
    folders = [after for flag, after in zip(sys.argv, [*sys.argv[1:], ""], strict=True) if flag in CONFIG_DIR]
    folders += [argument.partition("=")[2] for argument in sys.argv if argument.partition("=")[0] in CONFIG_DIR]
    broken = []
    for path in sorted(path for folder in folders for path in Path(folder).rglob("*.y*ml")):
        try:
            content = OmegaConf.load(path)
        except (yaml.YAMLError, ValueError, OSError) as error:
            message = " ".join(str(error).split())
            broken.append(f"{path} is no YAML that can be read: {message}. Mend the file.")
            continue
        defaults = content.get("defaults") if isinstance(content, DictConfig) else None
        if defaults is not None and not OmegaConf.is_list(defaults):
            broken.append(f"{path}: defaults must be a list, as in the files of conf/. Mend the file.")
    return broken


def _unknown(key: str, root: str) -> str:
    if (CONF / key).is_dir():
        return f"{key} is chosen with a plus: +{key}=... {_listed(key)}"
    if (CONF / (group := key.replace(".", "/"))).is_dir():
        return f"{key} is a group of settings, chosen with a slash: {group}=... {_listed(group)}"
    GlobalHydra.instance().clear()  # of a sweep, which ends here
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = flatten(OmegaConf.to_container(compose(root)))  # type: ignore[arg-type]
    groups = [path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()]
    return f"{key} is not a setting.{near(key, [*settings, *groups], '')}{_in_grids(key)} {ALL}"


def _in_grids(key: str) -> str:
    """Where a setting goes that not all options of a group have, among which a sweep's command line chooses."""
    given = (each.lstrip("+").partition("=") for each in sys.argv[1:])
    several = [name.partition("@")[0] for name, _, value in given if "," in value]
    for group in several:
        if (CONF / group).is_dir() and key.startswith(f"{group.replace('/', '.')}."):
            return (
                f" While the sweep chooses {group}, what one option has is given beside it: "
                f"'hydra.sweeper.grids=[{{{group}: ..., {key}: ...}}]'."
            )
    return ""


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
