"""Several students of one cut and base become one: what is made of each tensor, and of their files."""
