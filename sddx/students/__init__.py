"""Pruned and recovered models: on disk, beside their teacher in the same weights, written plain."""
