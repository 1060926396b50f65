"""From scores to a cut: which units go, what stands in for them, and the proof that what is left is sound."""
