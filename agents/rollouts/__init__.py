"""How experience is collected and kept: environments, the buffer, rewards, statistics."""
