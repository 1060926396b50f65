"""The stages of a run, a folder each: `run`, what it does, `check`, what it refuses, and `cost`, what it takes."""
