"""One piece of work in several processes."""
