"""prune: from scores to a cut, and the proof that the model stays sound under it."""
