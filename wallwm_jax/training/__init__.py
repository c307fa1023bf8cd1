"""Training: stages and losses, the sharded step, checkpoints, metrics and the loop."""
