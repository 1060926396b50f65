"""train: the pruned model learns from the examples, with the unpruned one beside it where a term needs it."""
