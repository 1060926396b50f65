"""Training data: sources, answer checkers, rewriting templates, encoding, shards and self-data."""
