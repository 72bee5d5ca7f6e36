"""Arithmetic on embeddings: nearest neighbours, kNN classification, effective rank, whitening."""
