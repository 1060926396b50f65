"""Before torch is imported: one thread for each process of tests, which share the cores among themselves."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
