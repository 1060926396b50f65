"""What a run or a grid will cost, before anything is paid for or downloaded: `sddx plan +experiment=llama_26L`.

It takes the same settings as `python -m sddx.train`, also a grid (`--multirun +sweeps=paper_blocks`), and these
beside them: gpu=h100, probe=60s, context=2048, budget.gpu_hours=40.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import hydra
from omegaconf import DictConfig
from rich.console import Console

from sddx.config import CONF, register, resolve
from sddx.config.arguments import asks_for_help
from sddx.config.entry import command, mistakes_told, require_one_run, without_run_folder
from sddx.estimate.costs import Estimate
from sddx.estimate.show import show
from sddx.gguf.located import located
from sddx.stages.cost import estimated
from sddx.stages.evaluate.check import check_names
from sddx.sweep import launcher, sweeper
from sddx.train import check_settings


def verify(config: dict[str, Any]) -> None:
    """Raises UserError for keys and targets that are wrong, and for tasks that do not exist; the model need not be
    here."""
    check_settings(config)
    check_names(config)


def tell(estimates: Sequence[Estimate], configs: Sequence[dict[str, Any]]) -> None:
    """Print what these runs cost together."""
    show(estimates, configs[0], Console(width=max(100, Console().width)))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> None:
    """Print what a run, or each run of a grid, would cost."""
    with mistakes_told():
        require_one_run("plan them all")
        config = located(resolve(cfg))
        verify(config)
        tell([estimated(config)], [config])


if __name__ == "__main__":
    if asks_for_help(sys.argv):
        print(__doc__)
    register()
    launcher.install(verify, estimated, tell)
    sweeper.install()
    with without_run_folder():
        command(main)
