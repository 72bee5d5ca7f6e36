"""How good embeddings are, measured on labelled shards."""
