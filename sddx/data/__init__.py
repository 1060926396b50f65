"""Rows and texts: sources, checkers, templates, encoding, shards, and answers of the model's own."""
