"""Arithmetic on embeddings: who is near, and how many directions count."""
