"""Surgery: choose a cut, remove the blocks, prove that what is left is sound."""
