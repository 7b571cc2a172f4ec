"""Runs from start to end: specification, imitation, checkpoints, evaluation."""
