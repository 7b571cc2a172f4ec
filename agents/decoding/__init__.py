"""What makes rollouts and updates fast: the prefix cache, prepacked weights, packing."""
