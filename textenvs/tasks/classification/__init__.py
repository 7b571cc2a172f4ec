"""Label a review."""
