"""report: what a run found, from everything that it built."""
