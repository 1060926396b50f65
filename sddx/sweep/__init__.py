"""Grids of runs: composed and checked as a whole, planned, run cell by cell, and watched."""
