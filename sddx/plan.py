"""What a run or a grid will cost, before anything is paid for or downloaded: `python -m sddx.plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hydra
from omegaconf import DictConfig
from rich.console import Console

from sddx.config import CONF, register, resolve
from sddx.entry import command, mistakes_told, require_one_run, without_run_folder
from sddx.estimate.costs import Estimate
from sddx.estimate.show import show
from sddx.estimate.texts import items_of
from sddx.sweep import launcher, sweeper
from sddx.train import bind


def verify(config: dict[str, Any]) -> None:
    """Raises UserError for keys, targets and names that are wrong; the model need not be here."""
    from sddx.evaluation.tasks import check_tasks

    bind(config)
    evaluation = config["evaluation"]  # that lm-eval has the usual tasks need not be looked up, which takes seconds
    check_tasks([task for task in evaluation["tasks"] if items_of(str(task)) is None], evaluation["include"])


def tell(estimates: Sequence[Estimate], configs: Sequence[dict[str, Any]]) -> None:
    """Print what these runs cost together."""
    show(estimates, configs[0], Console(width=max(100, Console().width)))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> None:
    with mistakes_told():
        require_one_run("plan them all")
        config = resolve(cfg)
        verify(config)
        tell([Estimate(config)], [config])


if __name__ == "__main__":
    register()
    launcher.install(verify, Estimate, tell)
    sweeper.install()
    with without_run_folder():
        command(main)
