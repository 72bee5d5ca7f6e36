"""Pre-training: data path, optimiser, checkpoints, metrics, and the loop."""
