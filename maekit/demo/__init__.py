"""`maekit demo`: the whole pipeline on synthetic pictures."""
