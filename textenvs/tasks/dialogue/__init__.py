"""Book a table."""
