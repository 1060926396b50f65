"""From results to what is read. Nothing here imports torch."""
