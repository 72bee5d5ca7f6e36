"""Training of any task: data path, optimiser, checkpoints, metrics, and the loop."""
