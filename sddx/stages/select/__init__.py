"""select: which of the unpruned model's answers to one shard may be trained on."""
