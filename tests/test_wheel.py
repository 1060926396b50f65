"""An installed package needs nothing beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def test_the_wheel_carries_configuration_sweeps_and_model(tmp_path: Path) -> None:
    """From the unpacked wheel, in another directory, the command composes a sweep's cell and the tiny model."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=CHECKOUT, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    command = [
        sys.executable,
        "-m",
        "sddx.train",
        "--cfg",
        "job",
        "--resolve",
        "--package",
        "model",
        "+sweeps=depth",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = next(line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("path: "))
    assert path == str(tmp_path / "site" / "sddx" / "tiny" / "checkpoint")
    assert (Path(path) / "model.safetensors").is_file()
