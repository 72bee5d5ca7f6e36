"""Quality of embeddings, measured on labelled shards."""
