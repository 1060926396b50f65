"""The stages of a run, a folder each: `run` (a function of named inputs and settings), `check` (what it refuses)."""
