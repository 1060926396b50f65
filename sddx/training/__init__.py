"""Losses, the objective of an arm, and the loop that trains a student on it."""
