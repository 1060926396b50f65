"""Models: loading, where their parts sit, one-copy teacher, saving and rebuilding students."""
