"""distill: the unpruned model writes its own answer to every prompt of one shard."""
