"""Grids: composed, checked and planned as a whole, and the engines that run the cells."""
