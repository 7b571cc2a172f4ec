"""What a rollout is learned from: advantages, losses, the reference model, the update."""
