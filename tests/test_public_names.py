"""The names that users' YAML files may hold go on: each as it is, or by an old name in sddx/aliases.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra.utils import get_object

from sddx.aliases import current
from sddx.config import CONF

pytestmark = pytest.mark.fast

NAMES = Path(__file__).with_name("public_names.txt")
FROZEN = NAMES.read_text(encoding="utf-8").split()


def targets() -> set[str]:
    """Every dotted name of ours that conf/ and sweeps/ call."""
    texts = [path.read_text(encoding="utf-8") for path in CONF.rglob("*.yaml")]
    return set(re.findall(r"_target_: (sddx\.[\w.]+)", "\n".join(texts)))


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_public_name_still_means_something_to_call(name: str) -> None:
    assert callable(get_object(name)) and get_object(name) is get_object(current(name))


def test_every_target_of_our_files_is_public() -> None:
    """A new one is added to tests/public_names.txt, where it stays."""
    assert targets() <= set(FROZEN)
