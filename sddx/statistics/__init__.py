"""Intervals, tests and measures of answers, from plain numbers."""
