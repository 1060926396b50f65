"""Before torch is imported: one thread for each process of tests, which share the cores among themselves. And a
store that they share, for tests that read what runs leave."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from remembered import remember

os.environ.setdefault("OMP_NUM_THREADS", "1")
remember()

# Modules of half a minute and more come first, so that no process of tests ends with one while the other waits;
# those that build in the shared store stand beside others.
LONG = (
    "test_train", "test_config", "test_sweep", "test_vllm_evaluation", "test_vllm", "test_estimate", "test_export",
    "test_task_files", "test_speculation", "test_shards", "test_distributed", "test_rehearse", "test_report",
)  # fmt: skip


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one module's small run built, another's finds here, in the other process of tests too: the store's own
    locks are made for that. A law about building (a crash, a lock, what an empty store lacks) takes a store of its
    own."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared_store"


@pytest.fixture(scope="module")
def quick_groups() -> Iterator[None]:
    """Processes that work together on several devices are forked, and need not import all that they need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sddx.parallel.launch.get_context", forked.context)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Counts where the order is kept: xdist takes the modules of most tests first, unless it is told not to."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def pytest_collection_finish() -> None:
    """What was imported for the tests stays: the collector, which stages call, need not go through it each time."""
    gc.collect()
    gc.freeze()
