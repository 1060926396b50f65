"""Losses, the objective, the Lightning module, adapters."""
