"""score: how much each unit of a model matters, by one metric or by several."""
