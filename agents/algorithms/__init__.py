"""Algorithms: SB3's on-policy algorithms, for transformers."""
