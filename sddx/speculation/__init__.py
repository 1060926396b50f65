"""A small model drafts what a large one would write, and the large one reads whether it would (arXiv
2211.17192)."""
