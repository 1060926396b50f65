"""The seeds of evaluation."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

# The same seeds as lm-eval's command line, so that its numbers can be compared with ours; and that of the items
# that a limit draws.
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234, "items": 0}


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """lm-eval's seeds (some tasks shuffle choices on loading), and afterwards the random state as before."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
