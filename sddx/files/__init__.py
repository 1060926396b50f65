"""Text files, their forms and names, and who holds them."""
