"""Tar shards: which ones (spec), what is in them (tar, index), in which order (order), and how to read them (read).

Data flows one way: input spec -> shard files -> strict index -> order -> positional read -> bytes of a sample.
Nothing here decodes images, and importing it loads no heavy library.
"""
