"""How much of either student each block of a merge takes, chosen on selection items."""
