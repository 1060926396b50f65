"""draft: what a pruned or recovered model is worth as a draft for the unpruned one."""
