"""Other programs that write and judge, each in a process of its own: vLLM."""
