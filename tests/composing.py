"""Compose the real configuration as the command line does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from sddx import config
from sddx.config import CONF, register
from sddx.gguf.located import located

# A run of seconds: a few rows, steps and items.
SMALL = (
    "dataset.size=48", "validation=8", "calibration.size=32", "text.size=16", "trainer.batch_size=8",
    "trainer.log_every=1", "trainer.epochs=1", "evaluation.tasks=[tiny_arithmetic,tiny_facts]",
    "evaluation.limit=6", "generation.max_new_tokens=48", "wandb.mode=disabled", "run.name=small", "device=cpu",
)  # fmt: skip
# The same for the cells of a sweep, which are named for what varies.
SWEPT = (*(given for given in SMALL if not given.startswith("run.name")), "trainer.budget=steps", "trainer.steps=2")


@contextmanager
def composed(*overrides: str, out: Path | None = None, config_dir: Path | None = None) -> Iterator[DictConfig]:
    """The configuration under these overrides, with Hydra's own part set as in a run."""
    register()
    extra = [f"hydra.searchpath=[file://{config_dir}]"] if config_dir else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[*overrides, *extra], return_hydra_config=True)
        with open_dict(cfg):
            cfg.hydra.runtime.output_dir = str(out or "unused")
            cfg.hydra.job.num = 0
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        yield cfg


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as a run is given it."""
    return located(config.resolve(cfg))


def swept(out: Path, store: Path, *given: str) -> list[str]:
    """The command of a small sweep over two seeds, in a process of its own."""
    where = (f"store={store}", f"hydra.sweep.dir={out}")
    return [sys.executable, "-m", "sddx.train", "--multirun", *SWEPT, *where, "seed=0,1", *given]


def numbers(out: Path) -> dict[str, tuple]:
    """What every finished cell of a sweep found, by its name."""
    found = [json.loads(path.read_text()) for path in out.glob("*/summary.json")]
    kept = ("scores", "recovery", "supervised_tokens")
    return {run["name"]: (*(run[name] for name in kept), run["artifacts"]["train"]) for run in found}
