"""Several students of one cut become one."""
