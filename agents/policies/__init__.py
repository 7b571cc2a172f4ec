"""A transformer as an SB3 policy, and how its logits become tokens."""
