"""The embedded world: its model, rows, tasks and recipe, and rehearsals of large runs on it."""
