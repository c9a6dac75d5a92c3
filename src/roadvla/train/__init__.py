"""Training: warm-up, rollouts, updates, checkpoints, and the loop around them."""
