"""Exporting a trained encoder: the graph, its parity with PyTorch, and the file."""
