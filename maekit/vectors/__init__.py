"""Arithmetic on embeddings: nearest neighbours, kNN classification, whitening."""
