"""written: what the unpruned model wrote, and how surprised it and the pruned model are by it."""
