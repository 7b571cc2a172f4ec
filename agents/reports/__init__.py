"""What runs look like: pictures and tables."""
