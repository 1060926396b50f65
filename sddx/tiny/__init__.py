"""The embedded world: eight skills, a tokenizer, a pretrained checkpoint and the recipe that made them."""
