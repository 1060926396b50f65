"""What runs found: summaries, tables, curves, pages, W&B."""
