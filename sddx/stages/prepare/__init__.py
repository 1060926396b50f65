"""prepare: a dataset as rows on disk, in their seeded order."""
