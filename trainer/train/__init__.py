"""The training loop, its setup, step and optimizer, and the two stages."""
