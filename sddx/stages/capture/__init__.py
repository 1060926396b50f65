"""capture: what the teacher says of every answer token of one shard of rows, for trainings without it."""
