"""Continue a review."""
