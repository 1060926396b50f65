"""What a user runs: `sddx plan`, `sddx fetch` and so on, beside `python -m sddx.train`."""
