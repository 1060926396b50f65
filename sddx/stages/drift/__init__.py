"""drift: how far a pruned or recovered model moved from the unpruned one."""
