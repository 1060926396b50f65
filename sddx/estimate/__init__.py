"""What a configuration will cost, from dimensions alone: no weight is loaded and nothing is asked of a network."""
