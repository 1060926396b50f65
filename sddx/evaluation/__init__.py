"""Evaluation: the harness, what a recovery is, and how sure one can be of it."""
