"""Weights in and out: safetensors, verification, sharded checkpoints, export."""
