"""The stages of a run, a folder each: `run`, what it does to named inputs, and `check`, what it refuses before."""
