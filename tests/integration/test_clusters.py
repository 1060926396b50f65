"""A sweep of two small cells on a real Slurm and on a real Ray cluster of two nodes, both on this machine; the
first is the small case that every run of the tests takes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from composing import swept

from sddx.sweep import cells

pytestmark = pytest.mark.runs

HERE = Path(__file__).parent


def sweep(where: Path, *given: str, **surroundings: str) -> list[Path]:
    """Runs the sweep to its end; the folders of its cells."""
    done = subprocess.run(
        swept(where / "sweep", where / "store", *given),
        cwd=where, env=os.environ | surroundings, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(path.parent for path in where.glob(f"sweep/*/{cells.RECORD}"))


def check(folders: list[Path]) -> None:
    """Both cells ended once, in processes of their own, after the stages that they share were built once."""
    records = [cells.read(folder) for folder in folders]
    assert [record["state"] for record in records] == ["done", "done"]
    assert len({record["process"] for record in records} | {os.getpid()}) == 3
    unpruned = {json.loads((f / "summary.json").read_text())["artifacts"]["evaluate_unpruned"] for f in folders}
    assert len(unpruned) == 1


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[str]:
    if os.geteuid() or not shutil.which("slurmctld") or not shutil.which("munged"):
        pytest.skip("needs root and Debian's slurm-wlm and munge")
    if not importlib.util.find_spec("submitit"):
        pytest.skip("needs submitit: pip install 'sddx[submitit]'")
    folder = tmp_path / "slurm"
    try:
        subprocess.run([HERE / "slurm.sh", "start", folder], check=True, timeout=60)
        yield str(folder / "slurm.conf")
    finally:
        subprocess.run([HERE / "slurm.sh", "stop", folder], check=False, timeout=60)


def test_a_sweep_on_slurm(slurm: str, tmp_path: Path) -> None:
    plain = [f"hydra.launcher.engine.parameters.{name}=null" for name in ("gpus_per_node", "mem_gb")]
    one = "hydra.launcher.engine.parameters.cpus_per_task=1"
    engine = ["hydra/launcher=submitit_slurm", "hydra.launcher.engine.poll=1", one, *plain]
    folders = sweep(tmp_path, *engine, SLURM_CONF=slurm)
    check(folders)
    logs = list((tmp_path / "sweep" / ".submitit").glob("*submission.sh"))
    assert len(logs) == 2 and any("--dependency=afterany:" in log.read_text() for log in logs)


@pytest.fixture
def ray(tmp_path: Path) -> Iterator[str]:
    if not importlib.util.find_spec("ray"):
        pytest.skip("needs Ray: pip install 'sddx[ray]'")
    folder = tmp_path / "nodes"
    surroundings = os.environ | {"RAY": str(Path(sys.executable).with_name("ray"))}
    try:
        subprocess.run([HERE / "ray.sh", "start", folder, "6391"], check=True, timeout=120, env=surroundings)
        yield "127.0.0.1:6391"
    finally:
        subprocess.run([HERE / "ray.sh", "stop", folder], check=False, timeout=60, env=surroundings)


@pytest.mark.cluster
def test_a_sweep_on_two_nodes_of_ray(ray: str, tmp_path: Path) -> None:
    check(sweep(tmp_path, "hydra/launcher=ray", f"hydra.launcher.engine.address='{ray}'"))
