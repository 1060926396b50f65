"""Other programs that write and evaluate, each in a process of its own: vLLM."""
