"""overlap: which share of every evaluation task stands in the training rows."""
