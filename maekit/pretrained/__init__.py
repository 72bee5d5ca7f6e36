"""Weights in and out: maekit's own runs, and those of other people."""
