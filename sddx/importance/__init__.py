"""How much each unit of a model matters: hidden states, gradients, coalitions."""
