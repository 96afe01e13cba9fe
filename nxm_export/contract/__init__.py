"""What all stages agree on: the plan, the model families and tasks, checkpoints, and the files between stages."""
