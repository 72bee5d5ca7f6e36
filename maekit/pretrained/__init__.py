"""Reads and writes weights: those of maekit's own runs, and published ones."""
