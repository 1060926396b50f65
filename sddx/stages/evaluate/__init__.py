"""evaluate: any model, unpruned, pruned or recovered, through the same harness."""
