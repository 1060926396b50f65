"""lm-eval in this process, its tasks and items, and what held-out texts say of a model."""
