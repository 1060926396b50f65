"""What a run costs: work, memory, hours, from dimensions alone."""
