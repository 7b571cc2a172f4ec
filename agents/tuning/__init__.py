"""Searching for better options."""
